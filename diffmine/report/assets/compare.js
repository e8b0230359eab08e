// Two labels side by side, or one in two runs: which ones stands in the address, #a=NNNN&b=NNNN. Their data come from
// labels/NNNN.js and curation.js; those of the other run are called beside-NNNN.
(function () {
  "use strict";
  const CLUSTERS = 12, PATCHES = 6;  // shown of a label, and of a cluster
  const sides = ["a", "b"].map((name) => document.querySelector(`[name=${name}]`));
  const { wordsOn, make, mark, load, score, strip } = globalThis.diffmine.clusters;
  const counted = (n, one, many) => `${n} ${n === 1 ? one : many}`;

  function cluster(page, data, one, words) {
    const number = make("span", {}, `${one.rank + 1}`);
    mark(number, words);
    const told = make("p", { class: "row-facts" }, number, ": ", make("b", {}, `T ${score(data, one.median)}`),
      ` median, ${counted(one.size, "patch", "patches")} of ${counted(one.images, "image", "images")}`);
    return make("div", { class: "row" }, told, strip(page, data, one, PATCHES, `Cluster ${one.rank + 1}`));
  }

  async function show(select) {
    const page = select.value, place = document.getElementById(select.name), data = await load(page);
    if (select.value !== page) return;  // another was chosen meanwhile
    const name = make("bdi", {}, select.selectedOptions[0].textContent);
    const other = page.startsWith("beside-"), title = other ? name : make("a", { href: `labels/${page}.html` }, name);
    const wordsOf = (one) => (other ? undefined : wordsOn(data.label, one.cluster));  // they are on this run's clusters
    const seen = data.clusters.filter((one) => !wordsOf(one)?.hide), hidden = data.clusters.length - seen.length;
    const rows = seen.slice(0, CLUSTERS).map((one) => cluster(page, data, one, wordsOf(one)));
    const rest = hidden ? `${hidden} hidden by the curator.` : rows.length ? "" : "No clusters.";
    place.replaceChildren(make("h2", {}, title), ...rows, ...(rest ? [make("p", { class: "quiet" }, rest)] : []));
  }

  function look() {
    const chosen = new URLSearchParams(location.hash.slice(1));
    sides.forEach((select, i) => {
      select.value = chosen.get(select.name) ?? "";
      if (select.selectedIndex < 0) select.selectedIndex = Math.min(i, select.length - 1);
      show(select);
    });
  }
  for (const select of sides) {
    select.addEventListener("input", () => {
      history.replaceState(null, "", `#${new URLSearchParams(sides.map((one) => [one.name, one.value]))}`);
      show(select);
    });
  }
  addEventListener("hashchange", look);
  look();
})();

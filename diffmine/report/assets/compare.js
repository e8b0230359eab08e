// Two labels side by side, or one in two runs: which ones stands in the address, #a=NNNN&b=NNNN. Their data come from
// labels/NNNN.js; of the other run, whose pages are called beside-NNNN, from beside/NNNN.js.
(function () {
  "use strict";
  const CLUSTERS = 12, PATCHES = 6;  // shown of a label, and of a cluster
  const sides = ["a", "b"].map((name) => document.querySelector(`[name=${name}]`));
  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const counted = (n, one, many) => `${n} ${n === 1 ? one : many}`;
  const loading = {};
  const load = (page) => (loading[page] ??= new Promise((resolve, reject) => {
    const script = make("script", { src: page.startsWith("beside-") ? `${page.replace("-", "/")}.js` : `labels/${page}.js` });
    script.onload = () => resolve(globalThis.diffmine[page]);
    script.onerror = () => reject(new Error(`${script.src} is missing`));
    document.head.append(script);
  }));

  function cluster(page, data, one) {
    const score = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(data.decimals);
    const strip = make("ul", { class: "strip", "aria-label": `Cluster ${one.rank + 1}` });
    for (let i = one.first; i < Math.min(one.end, one.first + PATCHES); i += 1) {
      const alt = `T ${score(data.patches.typicality[i])}, ${data.images.id[data.patches.image[i]]}`;
      const picture = make("img", { src: one.strip, width: 96, height: 96, loading: "lazy", alt });
      const href = data.patches.id && `labels/${page}.html#patch=${data.patches.id[i]}`;  // not of the other run
      strip.append(make("li", {}, href ? make("a", { href }, picture) : make("span", {}, picture)));
    }
    const told = make("p", { class: "row-facts" }, `${one.rank + 1}: `, make("b", {}, `T ${score(one.median)}`),
      ` median, ${counted(one.size, "patch", "patches")} of ${counted(one.images, "image", "images")}`);
    return make("div", { class: "row" }, told, strip);
  }

  async function show(select) {
    const page = select.value, place = document.getElementById(select.name), data = await load(page);
    if (select.value !== page) return;  // another was chosen meanwhile
    const name = make("bdi", {}, select.selectedOptions[0].textContent);
    const title = page.startsWith("beside-") ? name : make("a", { href: `labels/${page}.html` }, name);
    const rows = data.clusters.slice(0, CLUSTERS).map((one) => cluster(page, data, one));
    place.replaceChildren(
      make("h2", {}, title), ...rows, ...(rows.length ? [] : [make("p", { class: "quiet" }, "No clusters.")]));
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

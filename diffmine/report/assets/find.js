// Overview: labels are searched and sorted. What was chosen is in the address, after the #, so that it can be shared.
(function () {
  "use strict";
  const form = document.querySelector(".find"), list = document.querySelector(".labels");
  const labels = [...list.children].filter((label) => "name" in label.dataset);
  const plain = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();  // "Genève" is found by "geneve"
  const number = (key) => (a, b) => Number(b.dataset[key]) - Number(a.dataset[key]);
  const orders = {
    typicality: number("typicality"), images: number("images"), coverage: number("coverage"), hits: number("hits"),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };

  function show() {
    const chosen = new URLSearchParams(location.hash.slice(1));
    form.q.value = chosen.get("q") || "";
    form.sort.value = chosen.get("sort") || "";
    if (!form.sort.value) form.sort.selectedIndex = 0;
    const wanted = plain(form.q.value.trim());
    for (const label of labels) label.hidden = !plain(label.dataset.name).includes(wanted);
    list.append(...labels.sort(orders[form.sort.value]));
    const found = labels.filter((label) => !label.hidden).length;
    form.querySelector("output").value = wanted ? `${found} of ${labels.length} labels` : "";
  }

  function choose() {
    const chosen = new URLSearchParams();
    if (form.q.value.trim()) chosen.set("q", form.q.value.trim());
    if (form.sort.selectedIndex > 0) chosen.set("sort", form.sort.value);
    history.replaceState(null, "", "#" + chosen);
    show();
  }

  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", show);
  addEventListener("led", show);  // other clusters lead than the page was made with
  form.hidden = false;
  show();
})();

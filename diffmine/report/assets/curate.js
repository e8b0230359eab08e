// A curator's words on clusters: name, note, star, hide. They are given on a label's page;
// the overview exports them, too.
(function () {
  "use strict";
  const { clustersOf, words, wordsOn, drafted, draft, make, mark } = globalThis.diffmine.clusters;
  const main = document.querySelector("main"), rows = [...main.querySelectorAll("[data-cluster]")];
  const label = main.dataset.label === undefined ? null : main.dataset.label;
  const blank = (row) => ({ label, cluster: Number(row.dataset.cluster), page: main.dataset.page,
    rank: Number(row.dataset.rank), name: "", note: "", star: false, hide: false });
  const wordsOf = (row) => wordsOn(label, Number(row.dataset.cluster)) ?? blank(row);

  function change(row, changes) {
    draft({ ...wordsOf(row), ...changes });
    tell();
    show(row);
  }

  // --------------------------------------------------------------------------------------------- a label's page
  function show(row) {
    const words = wordsOf(row), curating = main.classList.contains("curating");
    row.querySelectorAll(".curated").forEach((one) => one.remove());
    mark(row.querySelector("h3"), words);
    if (words.note) row.querySelector("summary").after(make("p", { class: "curated note" }, words.note));
    row.classList.toggle("dropped", words.hide);
    row.hidden = words.hide && !curating;
    const hidden = rows.filter((one) => wordsOf(one).hide).length, told = document.querySelector(".hidden-clusters");
    if (told) told.textContent = hidden ? `${hidden} hidden by the curator; “Curate” shows ${hidden > 1 ? "them" : "it"}.` : "";
  }

  function fields(row) {
    if (row.querySelector(".curate")) return;
    const words = wordsOf(row), form = make("form", { class: "curate" });
    const field = (type, name, text, value) => {
      const input = make("input", { type, name, autocomplete: "off" }), caption = make("label", {}, text);
      if (type === "checkbox") input.checked = value; else input.value = value;
      if (type === "checkbox") caption.prepend(input); else caption.append(input);
      form.append(caption);
    };
    field("checkbox", "star", " Star", words.star);
    field("checkbox", "hide", " Hide", words.hide);
    field("text", "name", "Name ", words.name);
    field("text", "note", "Note ", words.note);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => change(row, {
      star: form.star.checked, hide: form.hide.checked, name: form.elements.name.value.trim(), note: form.note.value.trim(),
    }));
    row.querySelector("summary").after(form);
  }

  const tools = document.querySelector(".tools");
  tools?.curate.addEventListener("input", () => {
    main.classList.toggle("curating", tools.curate.checked);
    if (tools.curate.checked) rows.forEach(fields);
    rows.forEach(show);
    tell();
  });
  rows.forEach(show);

  // ------------------------------------------------------------------------------------------------ to take away
  function tell() {
    const count = words().length, link = document.querySelector(".export");
    if (!link) return;
    link.hidden = count === 0 || !(drafted() || main.classList.contains("curating"));  // not for those who only read
    link.textContent = `Export curation (${count})`;
  }
  document.querySelector(".export")?.addEventListener("click", (event) => {
    const clusters = words().map(({ label, cluster, name, note, star, hide }) =>
      ({ label, cluster, name, note, star, hide }));
    const text = JSON.stringify({ clusters_of: clustersOf, clusters }, null, 1);
    event.target.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  });
  tell();
})();

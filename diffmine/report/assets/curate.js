// A curator's words on clusters: name, note, star, hide. Those that are built into the report come from curation.js;
// newer ones are kept by this browser until they are exported for `diffmine report RUN --curation FILE`.
(function () {
  "use strict";
  const built = globalThis.diffmine.curation, key = `diffmine curation ${built.clusters_of}`;
  const main = document.querySelector("main"), rows = [...main.querySelectorAll("[data-cluster]")];
  const nameOf = (words) => JSON.stringify([words.label, words.cluster]);
  const all = new Map(built.clusters.map((words) => [nameOf(words), words]));
  let drafts = {};
  try { drafts = JSON.parse(localStorage.getItem(key)) ?? {}; } catch { /* nothing is kept here */ }
  for (const [name, words] of Object.entries(drafts)) all.set(name, words);
  const label = main.dataset.label === undefined ? null : main.dataset.label;
  const blank = (row) => ({ label, cluster: Number(row.dataset.cluster), page: main.dataset.page,
    rank: Number(row.dataset.rank), name: "", note: "", star: false, hide: false });
  const wordsOn = (row) => all.get(nameOf(blank(row))) ?? blank(row);

  function change(row, changes) {
    const words = { ...wordsOn(row), ...changes };
    all.set(nameOf(words), words);
    drafts[nameOf(words)] = words;
    try { localStorage.setItem(key, JSON.stringify(drafts)); } catch { /* only for this visit, then */ }
    tell();
    show(row);
  }

  // --------------------------------------------------------------------------------------------- a label's page
  const element = (tag, name, text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });

  function show(row) {
    const words = wordsOn(row), curating = main.classList.contains("curating");
    row.querySelectorAll(".curated").forEach((one) => one.remove());
    const title = row.querySelector("h3");
    if (words.star) title.append(element("span", "curated star", " ★"));
    if (words.name) title.append(element("bdi", "curated name", ` ${words.name}`));
    if (words.note) row.querySelector("summary").after(element("p", "curated note", words.note));
    row.classList.toggle("dropped", words.hide);
    row.hidden = words.hide && !curating;
    const hidden = rows.filter((one) => wordsOn(one).hide).length, told = document.querySelector(".hidden-clusters");
    if (told) told.textContent = hidden ? `${hidden} hidden by the curator; “Curate” shows ${hidden > 1 ? "them" : "it"}.` : "";
  }

  function fields(row) {
    if (row.querySelector(".curate")) return;
    const words = wordsOn(row), form = element("form", "curate");
    const field = (type, name, text, value) => {
      const input = Object.assign(document.createElement("input"), { type, name, autocomplete: "off" });
      if (type === "checkbox") input.checked = value; else input.value = value;
      const caption = element("label", "", text);
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
  });
  rows.forEach(show);

  // ---------------------------------------------------------------------------------------------- the overview
  for (const article of main.querySelectorAll("article[data-page]")) {
    const own = [...all.values()].filter((words) => words.page === article.dataset.page);
    const hidden = new Set(own.filter((words) => words.hide).map((words) => words.rank));
    const first = Number(article.dataset.best), strip = article.querySelector(".strip");
    let best = first;
    while (hidden.has(best)) best += 1;
    const words = own.find((one) => one.rank === best);
    if (best > first && best < Number(article.dataset.clusters)) {  // the best that is not hidden
      for (const [n, picture] of strip.querySelectorAll("img").entries()) {
        picture.src = picture.getAttribute("src").replace(/cluster-\d+/, `cluster-${String(best).padStart(3, "0")}`);
        picture.alt = `Patch ${n + 1} of cluster ${best + 1}`;
        picture.parentNode.href = picture.parentNode.href.split("#")[0];
      }
    }
    const said = [words?.name, own.some((one) => one.star) ? `★ ${own.filter((one) => one.star).length}` : ""].filter(Boolean);
    if (said.length) article.querySelector("h2").append(element("small", "curated", said.join(" · ")));
  }

  // ------------------------------------------------------------------------------------------------ to take away
  function tell() {
    const count = all.size, link = document.querySelector(".export");
    if (!link) return;
    link.hidden = count === 0;
    link.textContent = `Export curation (${count})`;
  }
  document.querySelector(".export")?.addEventListener("click", (event) => {
    const clusters = [...all.values()].map(({ label, cluster, name, note, star, hide }) =>
      ({ label, cluster, name, note, star, hide }));
    const text = JSON.stringify({ clusters_of: built.clusters_of, clusters }, null, 1);
    event.target.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  });
  tell();
})();

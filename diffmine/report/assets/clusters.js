// What pages share: elements, data from scripts, a curator's words on clusters, and clusters from labels/NNNN.js (of
// another run, whose pages are called beside-NNNN, from beside/NNNN.js). Words that are built into the report come from
// curation.js; newer ones are kept by this browser until they are exported for `diffmine report RUN --curation FILE`.
(function () {
  "use strict";
  const built = globalThis.diffmine.curation, key = `diffmine curation ${built.clusters_of}`;
  const nameOf = (label, cluster) => JSON.stringify([label, cluster]);
  const all = new Map(built.clusters.map((words) => [nameOf(words.label, words.cluster), words]));
  let drafts = {};
  try { drafts = JSON.parse(localStorage.getItem(key)) ?? {}; } catch { /* nothing is kept here */ }
  for (const [name, words] of Object.entries(drafts)) all.set(name, words);

  function draft(words) {
    const name = nameOf(words.label, words.cluster);
    all.set(name, words);
    drafts[name] = words;
    try { localStorage.setItem(key, JSON.stringify(drafts)); } catch { /* only for this visit, then */ }
  }

  const make = (tag, attributes = {}, ...children) => {
    const made = tag === "svg" || tag === "image" || tag === "rect"
      ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  function mark(title, words) {  // a star and a name beside a cluster's number
    if (words?.star) title.append(make("span", { class: "curated star" }, " ★"));
    if (words?.name) title.append(make("bdi", { class: "curated name" }, ` ${words.name}`));
  }

  const loading = {};
  const fetched = (name, src) => (loading[name] ??= new Promise((resolve, reject) => {  // what a script leaves behind
    const script = make("script", { src });
    script.onload = () => resolve(globalThis.diffmine[name]);
    script.onerror = () => reject(new Error(`${src} is missing`));
    document.head.append(script);
  }));
  const load = (page) => fetched(page, `${page.startsWith("beside-") ? page.replace("-", "/") : `labels/${page}`}.js`);

  const score = (data, value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(data.decimals);

  function strip(page, data, one, most, title) {  // the first patches of a cluster
    const made = make("ul", { class: "strip", "aria-label": title });
    for (let i = one.first; i < Math.min(one.end, one.first + most); i += 1) {
      const alt = `T ${score(data, data.patches.typicality[i])}, ${data.images.id[data.patches.image[i]]}`;
      const picture = make("img", { src: one.strip, width: 96, height: 96, loading: "lazy", alt });
      const href = data.patches.id && `labels/${page}.html#patch=${data.patches.id[i]}`;  // not of the other run
      made.append(make("li", {}, href ? make("a", { href }, picture) : make("span", {}, picture)));
    }
    return made;
  }

  globalThis.diffmine.clusters = {
    clustersOf: built.clusters_of, words: () => [...all.values()],
    wordsOn: (label, cluster) => all.get(nameOf(label, cluster)),  // undefined where there are none
    draft, drafted: () => Object.keys(drafts).length > 0, make, mark, fetched, load, score, strip,
  };
})();

// A label's page: typicality maps over its patches, each patch in its whole image, views, and a curator's words.
// What is open stands in the address after the #: patch=ID, view=top. The data come from NNNN.js, when they are needed.
(function () {
  "use strict";
  const { make, fetched } = globalThis.diffmine.clusters;
  const main = document.querySelector("main"), page = main.dataset.page, tools = document.querySelector(".tools");
  const cells = [...main.querySelectorAll(".strip:not(.samples) a")];  // in the order of the data's patches
  const contexts = [...main.querySelectorAll(".context a")];
  const idOf = (cell) => new URLSearchParams(cell.hash.slice(1)).get("patch");
  const memory = {  // of the browser, where it has one
    get(key) { try { return localStorage.getItem(key); } catch { return null; } },
    set(key, value) { try { localStorage.setItem(key, value); } catch { /* only for this visit, then */ } },
  };

  let data = null;
  const load = () => fetched(page, `${page}.js`).then((found) => { data = found; });
  const plain = (value) => value.toFixed(data.decimals);
  const score = (value) => (value < 0 ? "−" : "+") + plain(Math.abs(value));
  const bdi = (text) => make("bdi", {}, text);  // of any script, among ours

  // -------------------------------------------------------------------------------------------------------- maps
  const UP = [230, 97, 1], DOWN = [94, 60, 153];  // orange and violet: told apart by all eyes; zero is clear
  const valuesOf = (text) => Int8Array.from(atob(text), (c) => c.charCodeAt(0));

  function painted([rows, columns, text]) {
    const canvas = make("canvas", { width: columns, height: rows }), context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    valuesOf(text).forEach((value, i) => {
      pixels.data.set([...(value > 0 ? UP : DOWN), Math.abs(value) * 2], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function cover(cell) {  // a patch with its map
    const i = cells.indexOf(cell), map = data?.patches.map[i];
    if (!map || cell.querySelector("canvas")) return;
    const [, , width, height] = data.patches.box[i], side = Math.max(width, height), canvas = painted(map);
    canvas.style.width = `${(100 * width) / side}%`;
    canvas.style.height = `${(100 * height) / side}%`;
    cell.append(canvas);
  }
  const mapImage = (map, place) =>
    make("image", { ...place, class: "map", href: painted(map).toDataURL(), preserveAspectRatio: "none" });
  const uncover = (cell) => { if (!tools.always.checked) cell.querySelector("canvas")?.remove(); };

  function coverWhole(link) {  // an image in context with its map
    const svg = link.querySelector("svg.whole"), i = data.patches.id.indexOf(idOf(link));
    const map = data.maps[data.patches.whole[i]], place = data.images.whole[data.patches.image[i]];
    if (!map || !place || svg.querySelector(".map")) return;
    const [x, y, width, height] = place;
    svg.querySelector("image").after(mapImage(map, { x, y, width, height }));
  }

  function coverAll() {
    if (tools.always.checked) {
      load().then(() => {
        if (!tools.always.checked) return;  // unticked meanwhile
        legend();
        cells.forEach(cover);
        contexts.forEach(coverWhole);
      });
    } else {
      cells.forEach(uncover);
      contexts.forEach((link) => link.querySelector(".map")?.remove());
    }
  }

  function legend() {
    const steps = Int8Array.from({ length: 127 }, (_, i) => 2 * (i - 63));
    const scale = painted([1, 127, btoa(String.fromCharCode(...new Uint8Array(steps.buffer)))]);
    scale.setAttribute("aria-hidden", "true");
    tools.querySelector(".legend").replaceChildren(
      `T ${score(-data.unit)} `, scale, ` ${score(data.unit)}`);
  }

  // --------------------------------------------------------------------------------------- what is under the hand
  const tip = make("p", { class: "tip", "aria-hidden": "true" });

  function enter(cell) {
    tip.textContent = cell.firstElementChild.alt;
    cell.closest(".strip").append(tip);
    load().then(() => {
      if (tip.parentNode === cell.closest(".strip") && tip.textContent === cell.firstElementChild.alt) cover(cell);
      legend();
    });
  }
  function leave(cell) {
    uncover(cell);
    tip.remove();
  }
  const cellOf = (event) => cells.find((cell) => cell === event.target.closest?.(".strip a"));
  for (const [on, off] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    main.addEventListener(on, (event) => { const cell = cellOf(event); if (cell) enter(cell); });
    main.addEventListener(off, (event) => { const cell = cellOf(event); if (cell) leave(cell); });
  }

  // Each strip is one stop of the Tab key; the arrows go on from there.
  const rowOf = (cell) => cells.filter((other) => other.closest(".strip") === cell.closest(".strip"));
  const strips = [...new Set(cells.map((cell) => cell.closest(".strip")))];
  const stop = (cell) => rowOf(cell).forEach((other) => { other.tabIndex = other === cell ? 0 : -1; });
  for (const strip of strips) strip.querySelectorAll("a").forEach((cell, n) => { cell.tabIndex = n ? -1 : 0; });
  main.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
    const own = rowOf(cell), n = own.indexOf(cell);
    const seen = strips.filter((strip) => strip.checkVisibility()), at = seen.indexOf(cell.closest(".strip"));
    const beside = (step) => seen[at + step]?.querySelectorAll("a");
    const next = {
      ArrowRight: () => own[n + 1], ArrowLeft: () => own[n - 1], Home: () => own[0], End: () => own.at(-1),
      ArrowDown: () => { const to = beside(1); return to?.[Math.min(n, to.length - 1)]; },
      ArrowUp: () => { const to = beside(-1); return to?.[Math.min(n, to.length - 1)]; },
    }[event.key]?.();
    if (!next) return;
    event.preventDefault();
    stop(next);
    next.focus();
  });

  // ------------------------------------------------------------------------------------------------- one patch
  const dialog = document.querySelector("dialog");
  let opened = null, strip = null;  // the cell that is shown, and the strip that was last chosen from
  main.addEventListener("click", (event) => { strip = cellOf(event)?.closest(".strip"); });

  function picture(i, source = null) {  // the whole image where the page has it or its source; else the patch alone
    const { patches, images } = data, image = patches.image[i], [x, y, width, height] = patches.box[i];
    const size = images.size[image] ?? [x + width, y + height], place = images.whole[image], entire = place || source;
    const whole = { x: 0, y: 0, width: size[0], height: size[1] }, box = { x, y, width, height };
    const svg = make("svg", { class: entire ? "whole" : "whole part", role: "img",
      viewBox: entire ? `0 0 ${size[0]} ${size[1]}` : `${x} ${y} ${width} ${height}`,
      "aria-label": entire ? `${images.id[image]}, the patch outlined` : `The patch of ${images.id[image]}` });
    if (place) {
      const cut = place.map((value, n) => (n < 2 ? value + 0.75 : value - 1.5));  // neighbours run into each other
      const inner = make("svg", { ...whole, viewBox: cut.join(" "), preserveAspectRatio: "none" });
      inner.append(make("image", { ...data.sheet, href: `../${data.sheet.href}` }));
      svg.append(inner);
    } else if (source) {
      svg.append(make("svg", { ...whole, viewBox: `0 0 ${size[0]} ${size[1]}` }, make("image", source)));
    } else {
      const cell = cells[i].firstElementChild, style = getComputedStyle(cell), side = Math.max(width, height);
      const at = Number(style.getPropertyValue("--n") || 0) + Number(style.getPropertyValue("--first") || 0);
      const [w, h] = [width / side, height / side].map((of) => 0.96 * of);  // of its cell, in the middle of which it lies
      const inner = make("svg", { ...box, viewBox: `${at + (1 - w) / 2} ${(1 - h) / 2} ${w} ${h}` });
      inner.append(make("image", { href: cell.getAttribute("src"), height: 1,
        width: cell.naturalWidth / cell.naturalHeight || 1, preserveAspectRatio: "none" }));
      svg.append(inner);
    }
    const map = place ? data.maps[patches.whole[i]] : patches.map[i], under = place ? whole : box;
    const figure = make("figure", {}, svg);
    if (!entire && images.lost[image] === null) {
      figure.append(make("figcaption", {},
        `The patch alone: this report does not store its whole image (report.whole_images ${data.stored}).`));
    }
    if (map) {
      svg.append(mapImage(map, under));
      const values = valuesOf(map[2]), here = make("output", { class: "here" });
      svg.addEventListener("pointermove", (event) => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
        const column = Math.floor(((at.x - under.x) / under.width) * map[1]);
        const line = Math.floor(((at.y - under.y) / under.height) * map[0]);
        const inside = column >= 0 && line >= 0 && column < map[1] && line < map[0];
        here.value = inside ? `T here ${score((values[line * map[1] + column] * data.unit) / 127)}` : "";
      });
      figure.append(here);
    }
    if (entire) svg.append(make("rect", { ...box, class: "box" }));
    return figure;
  }

  // An image that is not stored, from its source, where that lies beside the page: on the disk, or on the server. It is
  // placed as it was prepared for mining, or not shown where its size is not that of the image that was mined.
  function fitted(source, size) {
    const { short_side: side, multiple_of: step } = data.prepared, natural = [source.naturalWidth, source.naturalHeight];
    const scale = side / Math.min(...natural), resized = natural.map((n) => Math.floor((n * side) / Math.min(...natural)));
    if (resized.some((n, k) => n - (n % step) !== size[k])) return null;
    const [x, y] = resized.map((n, k) => -Math.floor((n - size[k]) / 2));
    return { href: source.src, x, y, width: scale * natural[0], height: scale * natural[1], preserveAspectRatio: "none" };
  }
  function fetchSource(i, figure) {
    const { images } = data, image = data.patches.image[i], href = images.href[image];
    if (!href || images.whole[image] || !images.size[image]) return;
    const url = new URL(href, location), source = new Image();
    if (url.protocol !== location.protocol || url.host !== location.host) return;
    source.addEventListener("load", () => {
      const found = fitted(source, images.size[image]);
      if (found && figure.isConnected) figure.replaceWith(picture(i, found));
    });
    source.src = url;
  }

  function facts(i) {
    const { patches, images } = data, image = patches.image[i], [x, y, width, height] = patches.box[i];
    const cluster = data.clusters.find((one) => one.first <= i && i < one.end);
    const [fresh, contrast, again] = [patches.fresh, patches.contrast, patches.fresh_contrast].map((known) => known?.[i] ?? null);
    const kind = ["most typical", "random", "least typical"][patches.kind[i]];
    const lines = [
      ["T", `${score(patches.typicality[i])} ± ${plain(patches.stderr[i])}`],
      ["with fresh draws", fresh === null ? null : `${score(fresh)} ± ${plain(patches.fresh_stderr[i])}`],
      ["above the other labels by", contrast === null ? null : `${score(contrast)} (the strongest: ${patches.rival[i]})`],
      ["the same with fresh draws", again === null ? null : `${score(again)} ± ${plain(patches.fresh_contrast_stderr[i])}`],
      ["label", patches.label?.[i] ?? data.label],
      ["rank", `${patches.rank[i] + 1} (${kind})`],
      ["cluster", cluster ? `${cluster.rank + 1}: ${cluster.size} patches, median T ${score(cluster.median)}` : null],
      ["box", `x ${x}, y ${y}, ${width} × ${height} pixels of the prepared image`],
      ...Object.entries(images.facts[image]),
      ["lost", images.lost[image] === null ? null : `the image can no longer be read: ${images.lost[image]}`],
    ];
    const list = make("dl");
    for (const [name, value] of lines) if (value !== null) list.append(make("dt", {}, name), make("dd", {}, bdi(value)));
    const uri = images.uri[image] ?? images.base + images.id[image], href = images.href[image];
    list.append(make("dt", {}, "source"), make("dd", {}, href ? make("a", { href, rel: "noreferrer" }, bdi(uri)) : bdi(uri)));
    return list;
  }

  function show(cell) {
    const i = cells.indexOf(cell), group = rowOf(cell), n = group.indexOf(cell);
    opened = cell;
    strip = cell.closest(".strip");
    const neighbours = strip.cloneNode(true);
    neighbours.querySelectorAll("canvas, .tip").forEach((one) => one.remove());
    neighbours.querySelectorAll("a").forEach((one, m) => {
      one.tabIndex = 0;
      if (m === n) one.setAttribute("aria-current", "true");
    });
    const step = (to, text, name) => to
      ? make("a", { href: to.hash, class: "step", "aria-label": name }, text) : make("span", { class: "step" }, text);
    const figure = picture(i), close = make("button", { type: "button", class: "close" }, "Close");
    const mapped = make("button", { type: "button", "aria-pressed": !dialog.classList.contains("plain") }, "Map of T");
    mapped.addEventListener("click", () => {
      mapped.setAttribute("aria-pressed", !dialog.classList.toggle("plain"));
    });
    close.addEventListener("click", () => dialog.close());
    dialog.replaceChildren(
      make("header", {}, make("h2", { id: "patch-title" }, bdi(data.images.id[data.patches.image[i]])),
        step(group[n - 1], "←", "The patch before"), step(group[n + 1], "→", "The next patch"),
        ...(figure.querySelector(".map") ? [mapped] : []), close),
      make("div", { class: "patch" }, figure, facts(i)), neighbours);
    fetchSource(i, figure);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
  dialog.addEventListener("close", () => {
    say({ patch: null });
    stop(opened);
    opened.closest("details")?.setAttribute("open", "");
    (opened.checkVisibility() ? opened : tools.view).focus();  // the address may open a patch that the view hides
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key], group = rowOf(opened);
    const next = to && group[group.indexOf(opened) + to];
    if (next) { event.preventDefault(); location.hash = next.hash; }
  });

  // --------------------------------------------------------------------------------------------------- the address
  let view = "";
  function say(changes) {  // into the address, without a new entry of the history
    const state = new URLSearchParams(location.hash.slice(1));
    for (const [key, value] of Object.entries(changes)) if (value) state.set(key, value); else state.delete(key);
    history.replaceState(null, "", `#${state}`);
  }
  function look() {  // at the address
    const state = new URLSearchParams(location.hash.slice(1)), wanted = state.get("patch");
    if (state.has("view") || !wanted) view = state.get("view") ?? "";
    if (![...tools.view.options].some((option) => option.value === view)) view = "";
    tools.view.value = view;
    if (wanted && view) say({ view });
    const ofClusters = !view || view === "clusters", ofKinds = view !== "clusters";
    for (const part of main.querySelectorAll("[data-view]")) {
      part.hidden = !(part.dataset.view === "clusters" ? ofClusters : ofKinds);
    }
    for (const kind of main.querySelectorAll("[data-kind]")) kind.hidden = view !== "" && view !== kind.dataset.kind;
    const copies = cells.filter((cell) => idOf(cell) === wanted), seen = copies.filter((cell) => cell.checkVisibility());
    const found = seen.length ? seen : copies, cell = found.find((one) => one.closest(".strip") === strip) ?? found[0];
    if (cell) load().then(() => { legend(); show(cell); });
    else if (dialog.open) dialog.close();
  }
  addEventListener("hashchange", look);

  // ---------------------------------------------------------------------------------------------------- the tools
  const opacity = () => document.documentElement.style.setProperty("--map", tools.opacity.value / 100);
  tools.opacity.value = memory.get("diffmine opacity") ?? tools.opacity.value;
  tools.always.checked = memory.get("diffmine maps") === "always";
  tools.addEventListener("input", (event) => {
    if (event.target === tools.opacity) {
      opacity();
      memory.set("diffmine opacity", tools.opacity.value);
    } else if (event.target === tools.always) {
      coverAll();
      memory.set("diffmine maps", tools.always.checked ? "always" : "");
    } else if (event.target === tools.view) {
      say({ view: tools.view.value });
      look();
    }
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  opacity();
  tools.hidden = false;
  coverAll();
  look();
})();

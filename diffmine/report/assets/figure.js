// A cluster as a figure for a paper: a few patches and a caption, as SVG or PNG. The pictures come as data URIs from
// NNNN-figures.js, since a page opened from a disk may not read its own files.
(function () {
  "use strict";
  const { make, fetched } = globalThis.diffmine.clusters;
  const main = document.querySelector("main"), page = main.dataset.page;
  const SIDE = 96, GAP = 4, LINE = 16, LONGEST = 116;  // pixels, and characters of a line

  function lines(text) {
    const found = [""];
    for (const word of text.split(/\s+/)) {
      if (found.at(-1) && found.at(-1).length + word.length >= LONGEST) found.push("");
      found[found.length - 1] += (found.at(-1) ? " " : "") + word;
    }
    return found;
  }

  function drawn({ strip, count }, caption) {
    const width = count * (SIDE + GAP) - GAP, text = lines(caption), height = SIDE + 10 + text.length * LINE;
    const svg = document.implementation.createDocument("http://www.w3.org/2000/svg", "svg").documentElement;
    const add = (parent, tag, attributes, content = "") => {
      const made = svg.ownerDocument.createElementNS(svg.namespaceURI, tag);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      made.textContent = content;
      parent.append(made);
      return made;
    };
    for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(key, value);
    add(svg, "title", {}, caption);
    for (let i = 0; i < count; i += 1) {
      const cell = add(svg, "svg", { x: i * (SIDE + GAP), y: 0, width: SIDE, height: SIDE, viewBox: `${i + 0.02} 0.02 0.96 0.96` });
      add(cell, "image", { href: strip, width: count, height: 1, preserveAspectRatio: "none" });
    }
    text.forEach((line, i) => add(svg, "text", {
      x: 0, y: SIDE + 10 + (i + 0.75) * LINE, "font-family": "Helvetica, Arial, sans-serif", "font-size": 12, fill: "#1b1c1e",
    }, line));
    return { text: new XMLSerializer().serializeToString(svg), width, height };
  }

  async function png({ text, width, height }) {
    const scale = 3, picture = new Image(), canvas = make("canvas", { width: width * scale, height: height * scale });
    picture.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
    await picture.decode();
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  async function save(row, kind) {
    const figures = await fetched(`${page}-figures`, `${page}-figures.js`), rank = Number(row.dataset.rank);
    const words = row.querySelector(".name")?.textContent.trim(), figure = figures[rank];
    const made = drawn(figure, (words ? `${words}. ` : "") + figure.caption);
    const blob = kind === "SVG" ? new Blob([made.text], { type: "image/svg+xml" }) : await png(made);
    const download = `${page}-cluster-${rank + 1}.${kind.toLowerCase()}`;
    const link = make("a", { href: URL.createObjectURL(blob), download });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  for (const row of main.querySelectorAll("[data-cluster]")) {
    const place = make("p", { class: "take" }, "Figure: "), number = Number(row.dataset.rank) + 1;
    for (const kind of ["SVG", "PNG"]) {
      const label = `Cluster ${number} as a figure, ${kind}`;
      const button = make("button", { type: "button", "aria-label": label }, kind);
      button.addEventListener("click", () => save(row, kind));
      place.append(button, " ");
    }
    row.append(place);
  }
})();

// Overview: the leading cluster of a label is the first that is neither small nor hidden by the curator; where all
// others are hidden, the first small one. Where that is another one than the page was made with, its figures and patches
// come from labels/NNNN.js.
(function () {
  "use strict";
  const { words, wordsOn, make, load, score, strip } = globalThis.diffmine.clusters;
  const PATCHES = 8;  // a row of the overview
  const list = document.querySelector(".labels"), largest = Number(list.dataset.largest);
  const percent = (share) => `${(100 * share).toFixed(share === 0 || share >= 0.0995 ? 0 : 1)}\u00a0%`;

  function measure(told, data, one) {
    const mark = one.doubt ? [" ", make("span", { class: "mark" }, `not told apart from ${one.doubt}`)] : [];
    told.replaceChildren(make("b", {}, `T ${score(data, one.median)}`),
      ` ± ${one.stderr.toFixed(data.decimals)}, leading cluster`, ...mark);
    const bar = told.previousElementSibling, fill = bar.querySelector(".fill"), error = bar.querySelector(".error");
    bar.classList.toggle("faint", Boolean(one.doubt));
    if (!error) return;  // no T is above zero
    const along = (value) => Math.min(Math.max(200 * value / largest, 0), 200);
    const low = along(one.median - one.stderr), high = along(one.median + one.stderr);
    fill.setAttribute("width", along(one.median).toFixed(1));
    error.setAttribute("x", low.toFixed(1));
    error.setAttribute("width", (high - low).toFixed(1));
  }

  function unlead(article, text) {  // nothing that may be shown leads
    article.querySelector(".strip").remove();
    article.querySelector(".covers").textContent = text;
    const told = article.querySelector(".leading");
    if (!told) return;
    told.previousElementSibling.remove();
    if (told.nextElementSibling) told.remove(); else told.parentNode.remove();
    Object.assign(article.dataset, { typicality: -1, coverage: 0 });
  }

  function lead(article, data, one) {
    const { page } = article.dataset, old = article.querySelector(".strip"), told = article.querySelector(".leading");
    const share = data.usable ? one.images / data.usable : 0;
    old.replaceWith(strip(page, data, one, PATCHES, old.getAttribute("aria-label")));
    article.querySelector(".share").replaceChildren(
      one.images === 1 ? make("span", { class: "warn" }, "is from one image")
        : `covers ${one.images.toLocaleString("en")} of them, ${percent(share)}`);
    if (!told) return;  // T is that of the most typical patches
    measure(told, data, one);
    Object.assign(article.dataset, { typicality: one.median, coverage: share });
  }

  async function choose(article) {
    const { page, best, clusters } = article.dataset, own = words().filter((one) => one.page === page);
    const hidden = own.filter((one) => one.hide), left = clusters - hidden.length;
    let leading = own.find((one) => one.rank === Number(best));
    if (hidden.length) {
      article.querySelector(".count").textContent = left > 1 ? `leading one of ${left} clusters` : "only cluster";
      article.querySelector(".covers").append(`; ${hidden.length} hidden by the curator`);
    }
    if (leading?.hide) {
      article.querySelector(".strip").style.visibility = "hidden";
      const data = await load(page).catch(() => null);
      const seen = data?.clusters.filter((one) => !wordsOn(data.label, one.cluster)?.hide);
      const one = seen?.find((cluster) => !cluster.small) ?? seen?.[0];
      leading = one && wordsOn(data.label, one.cluster);
      const all = left > 0 ? "all clusters on its page" : "all its clusters";
      if (one) lead(article, data, one);
      else unlead(article, data ? `; ${all} are hidden by the curator`
        : `; its leading cluster is hidden by the curator, and labels/${page}.js with the others is missing`);
    }
    const stars = own.filter((one) => one.star && !one.hide).length;
    const said = [leading?.name, stars ? `★ ${stars}` : ""].filter(Boolean);
    if (said.length) article.querySelector("h2").append(make("small", { class: "curated" }, said.join(" · ")));
  }

  Promise.all([...list.querySelectorAll("[data-best]")].map(choose)).then(() => dispatchEvent(new Event("led")));
})();

// Formulas, charts and search of the documentation site. Nothing here asks another host for anything.
(() => {
  // formulas: only where smalldocs marked them, so that no text of a model becomes one
  for (const span of document.querySelectorAll("span.math")) {
    const display = span.classList.contains("display");
    const source = span.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
    katex.render(source, span, { displayMode: display, throwOnError: false });
    if (display) span.tabIndex = 0;
  }

  // search: the index is a script, because a page opened from disk may not fetch
  let index = null;
  window.loadSearch = (offset) => index || (index = new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = offset + "site_libs/search.js";
    script.onload = () => resolve(window.searchIndex);
    script.onerror = reject;
    document.head.append(script);
  }));

  // charts
  const refuse = async (address) => { throw new Error("a chart of this site loads nothing: " + address); };
  const loader = {
    load: refuse, http: refuse, file: refuse,
    sanitize: async (address) => (String(address).startsWith("data:image/") ? { href: address } : refuse(address)),
  };
  const root = document.documentElement;
  const isDark = () => root.classList.contains("quarto-dark");
  const darkened = (key, value) => (typeof value === "string" && Object.hasOwn(DARK, value) ? DARK[value] : value);
  const charts = Array.from(document.querySelectorAll("figure.chart"));

  async function draw(figure) {
    const dark = isDark();
    if (figure.dataset.drawn === String(dark)) return;
    figure.dataset.drawn = dark;
    const spec = JSON.parse(figure.querySelector("script").textContent, dark ? darkened : undefined);
    const target = document.createElement("div");
    await vegaEmbed(target, spec, {
      mode: "vega-lite", renderer: "svg", ast: true, loader, tooltip: { theme: dark ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    const old = figure.querySelector("img") || figure.querySelector("div");
    figure.dataset.alt ??= old.alt;
    old.replaceWith(target);
    const svg = target.querySelector("svg.marks");
    if (!svg.getAttribute("aria-label")) svg.setAttribute("aria-label", figure.dataset.alt);
    figure.classList.add("drawn");
    figure.dataset.shown = dark;
    figure.tabIndex = 0; // wider than a telephone: it scrolls, and the keyboard must reach it
  }

  let drawing = Promise.resolve();
  const drawAll = () => {
    drawing = drawing.then(async () => {
      for (const chart of charts) await draw(chart).catch((error) => console.error("chart not drawn:", error));
      root.dataset.ready = "yes";
    });
  };
  if (charts.length) {
    Promise.all([document.fonts.load("400 12px Inter"), document.fonts.load("600 16px Inter")]).then(drawAll);
    new MutationObserver(drawAll).observe(root, { attributes: true, attributeFilter: ["class"] });
  } else {
    root.dataset.ready = "yes";
  }

  // the policy of the pages allows no inline handlers
  for (const toggle of document.querySelectorAll(".quarto-color-scheme-toggle")) {
    toggle.addEventListener("click", (event) => { event.preventDefault(); window.smalldocsToggleScheme(); });
  }
  for (const part of document.querySelectorAll(".sd-table, main pre")) part.tabIndex = 0;
})();

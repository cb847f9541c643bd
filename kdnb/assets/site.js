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

  // charts: DARK is put before this script
  const root = document.documentElement;
  const darkened = (key, value) => (typeof value === "string" && Object.hasOwn(DARK, value) ? DARK[value] : value);
  let drawing = Promise.resolve();
  const draw = () => {
    const dark = root.classList.contains("quarto-dark");
    drawing = drawing.then(() => drawCharts(dark ? "dark" : "light", dark ? darkened : undefined));
  };
  if (window.drawCharts) {
    draw();
    new MutationObserver(draw).observe(root, { attributes: true, attributeFilter: ["class"] });
  }

  // the policy of the pages allows no inline handlers
  for (const toggle of document.querySelectorAll(".quarto-color-scheme-toggle")) {
    toggle.addEventListener("click", (event) => { event.preventDefault(); window.smalldocsToggleScheme(); });
  }
  // what may be wider than a telephone scrolls, and the keyboard must reach it
  for (const part of document.querySelectorAll(".sd-table, main pre, figure.chart")) part.tabIndex = 0;
})();

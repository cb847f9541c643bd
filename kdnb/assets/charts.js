// Charts of the reports and of the documentation site, each drawn in place of what it says. A chart asks nobody for anything.
(() => {
  const refuse = async (address) => { throw new Error("a chart loads nothing: " + address); };
  const loader = {
    load: refuse, http: refuse, file: refuse,
    sanitize: async (address) => (String(address).startsWith("data:image/") ? { href: address } : refuse(address)),
  };

  async function draw(figure, scheme, recoloured) {
    if (figure.dataset.shown === scheme) return;
    const before = figure.querySelector("div");
    figure.dataset.said ??= before.textContent;
    const target = document.createElement("div");
    const spec = JSON.parse(figure.querySelector("script").textContent, recoloured);
    await vegaEmbed(target, { description: figure.dataset.said, ...spec }, {
      mode: "vega-lite", renderer: "svg", ast: true, loader, tooltip: { theme: scheme },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    before.replaceWith(target);
    figure.classList.add("drawn");
    figure.dataset.shown = scheme;
  }

  // Draws what is not drawn in this scheme yet. Calls must not overlap.
  window.drawCharts = async (scheme, recoloured) => {
    await Promise.all([document.fonts.load("400 12px Inter"), document.fonts.load("600 16px Inter")]);
    for (const chart of document.querySelectorAll("figure.chart")) {
      await draw(chart, scheme, recoloured).catch((error) => console.error("chart not drawn:", error));
    }
    document.documentElement.dataset.ready = "yes";
  };
})();

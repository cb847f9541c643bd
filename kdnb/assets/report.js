// Formulas, charts and the code switch of one report. Nothing here asks the network for anything.
(() => {
  if (window.renderMathInElement) {
    for (const part of document.querySelectorAll(".jp-RenderedMarkdown, .jp-RenderedLatex")) {
      renderMathInElement(part, {
        delimiters: [
          { left: "$$", right: "$$", display: true },
          { left: "\\[", right: "\\]", display: true },
          { left: "\\begin{align}", right: "\\end{align}", display: true },
          { left: "\\begin{equation}", right: "\\end{equation}", display: true },
          { left: "$", right: "$", display: false },
          { left: "\\(", right: "\\)", display: false },
        ],
        throwOnError: false,
      });
    }
  }

  const refuse = async (address) => { throw new Error("a chart in a report loads nothing: " + address); };
  const loader = {
    load: refuse, http: refuse, file: refuse,
    sanitize: async (address) => (String(address).startsWith("data:image/") ? { href: address } : refuse(address)),
  };

  async function draw(figure) {
    const target = document.createElement("div");
    await vegaEmbed(target, JSON.parse(figure.querySelector("script").textContent), {
      mode: "vega-lite", renderer: "svg", ast: true, loader,
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    figure.querySelector(".said").replaceWith(target);
    figure.classList.add("drawn");
  }

  const charts = document.querySelectorAll("figure.chart");
  if (charts.length) {
    Promise.all([document.fonts.load("400 12px Inter"), document.fonts.load("600 16px Inter")])
      .then(() => Promise.all(Array.from(charts, (chart) => draw(chart).catch((error) => console.error("chart not drawn:", error)))))
      .then(() => { document.documentElement.dataset.ready = "yes"; });
  } else {
    document.documentElement.dataset.ready = "yes";
  }

  const button = document.getElementById("all-code");
  const cells = document.querySelectorAll("details.code");
  if (!cells.length) button.hidden = true;
  button.addEventListener("click", () => {
    const open = button.textContent === "Show all code";
    cells.forEach((cell) => { cell.open = open; });
    button.textContent = open ? "Hide all code" : "Show all code";
  });
  const jump = () => { const cell = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); if (cell) cell.querySelectorAll("details.code").forEach((d) => { d.open = true; }); };
  addEventListener("hashchange", jump);
  jump();
})();

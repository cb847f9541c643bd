// Formulas, charts and the code switch of one report.
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

  if (window.drawCharts) drawCharts("light");

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

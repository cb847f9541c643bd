// Sorting and filtering of the list of reports. The summary of a run stays on top.
(() => {
  const compare = (a, b) => {
    const [x, y] = [a, b].map((v) => (v === "" ? NaN : Number(v)));
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    if (a === "" || b === "") return (a === "") - (b === "");
    return a.localeCompare(b, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.querySelectorAll("th"));
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.sort;
      const rows = Array.from(body.rows).filter((r) => !r.classList.contains("summary"));
      rows.sort((a, b) => (key(a) === "" || key(b) === "" ? compare(key(a), key(b)) : (down ? -1 : 1) * compare(key(a), key(b))));
      body.append(...rows);
    }));
  }
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const run of document.querySelectorAll("section.run")) {
      let here = 0;
      const name = run.querySelector("h2").textContent.toLowerCase();
      for (const row of run.querySelector("tbody").rows) {
        const text = name + " " + row.textContent.toLowerCase();
        row.hidden = !words.every((w) => text.includes(w));
        here += !row.hidden;
      }
      run.hidden = !here;
      shown += here;
    }
    document.getElementById("nothing").hidden = shown > 0;
  });
})();

// Sorting, filtering and comparing of the list of reports. The summary of a run stays on top.
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

  // Two reports side by side. Texts come from models and run files: they are set as text, never as markup.
  const known = JSON.parse(document.getElementById("compared").textContent);
  const place = document.getElementById("compare");
  const boxes = Array.from(document.querySelectorAll("input.pick"));
  let picked = [];

  const element = (tag, text, parent, name) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    if (name) made.className = name;
    parent.append(made);
    return made;
  };
  const shown = (value) => {
    const size = Math.abs(value);
    const text = size >= 1e4 || (size && size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return (value > 0 ? "+" : "") + text.replace(/-/g, "−");
  };

  function table(rows, pair, parent) {
    const made = element("table", null, element("div", null, parent, "scroll"));
    const head = element("tr", null, element("thead", null, made));
    element("th", "", head).scope = "col";
    for (const report of pair) {
      const cell = element("th", null, head, "number");
      cell.scope = "col";
      if (report.href) element("a", report.title, cell).href = report.href;
      else cell.textContent = report.title;
    }
    element("th", "difference", head, "number").scope = "col";
    const body = element("tbody", null, made);
    for (const [name, [a, x], [b, y]] of rows) {
      const row = element("tr", null, body, a === b ? "" : "differs");
      element("th", name, row).scope = "row";
      element("td", a, row, "number");
      element("td", b, row, "number");
      element("td", x === null || y === null || x === y ? "" : shown(y - x), row, "number");
    }
  }

  function compared(part, [one, two]) {
    const [left, right] = [one, two].map((report) => new Map(report[part].map(([name, text, value]) => [name, [text, value]])));
    const names = [...new Set([...left.keys(), ...right.keys()])];
    return names.map((name) => [name, left.get(name) || ["–", null], right.get(name) || ["–", null]]);
  }

  function draw() {
    boxes.forEach((box) => { box.checked = picked.includes(box.value); });
    place.hidden = picked.length < 2;
    place.replaceChildren();
    if (place.hidden) return;
    const pair = picked.map((name) => known[name]);
    element("h2", "Side by side", place);
    const parameters = compared("parameters", pair);
    const differs = ([, [a], [b]]) => a !== b;
    table([...compared("numbers", pair), ...compared("about", pair), ...parameters.filter(differs)], pair, place);
    const same = parameters.filter((row) => !differs(row));
    if (same.length) {
      const rest = element("details", null, place);
      element("summary", same.length === 1 ? "1 parameter is the same" : `${same.length} parameters are the same`, rest);
      table(same, pair, rest);
    }
    const close = element("button", "Close", place);
    close.type = "button";
    close.addEventListener("click", () => choose([]));
  }

  function choose(names) {
    picked = names;
    history.replaceState(null, "", picked.length === 2 ? "#" + picked.map(encodeURIComponent).join("&") : location.pathname + location.search);
    draw();
  }
  for (const box of boxes) {
    box.addEventListener("change", () => choose(box.checked ? [...picked, box.value].slice(-2) : picked.filter((name) => name !== box.value)));
  }
  const asked = () => {
    const names = location.hash.slice(1).split("&").map((name) => { try { return decodeURIComponent(name); } catch { return ""; } });
    picked = names.length === 2 && names.every((name) => Object.hasOwn(known, name)) ? names : [];
    draw();
  };
  addEventListener("hashchange", asked);
  asked();
})();

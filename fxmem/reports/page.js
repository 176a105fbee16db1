"use strict";
// The page of one step.  Everything comes from the JSON in #data; every text that comes from there is
// set as textContent or drawn on a canvas, so that a name cannot become markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const text = (index) => (index < 0 ? "" : data.strings[index]);

  data.decisions = data.decisions.map(([bytes, times, ms, ...words]) => {
    const [value, type, action, module, source, reason] = words.map(text);
    return { bytes, times, ms, value, type, action, module, source, reason };
  });

  const BUDGET = data.budgetColour;
  const GHOST = "#000000";

  const state = {
    sizes: data.symbols.map((symbol) => symbol.size),
    view: "after",
    sort: { storages: ["bytes", -1], decisions: ["bytes", -1], changes: ["bytes", -1] },
    filter: "",
    all: false,
    pinned: null,
  };

  // -- Numbers ---------------------------------------------------------------------------------

  function evaluate(tree, sizes) {
    if (typeof tree === "number") return tree;
    const [operator, ...parts] = tree;
    if (operator === "symbol") return sizes[parts[0]];
    const values = parts.map((part) => evaluate(part, sizes));
    const [a, b, c] = values;
    switch (operator) {
      case "+": return values.reduce((x, y) => x + y, 0);
      case "*": return values.reduce((x, y) => x * y, 1);
      case "^": return a ** b;
      case "/": return a / b;
      case "//": return Math.floor(a / b);
      case "%": return a - b * Math.floor(a / b);
      case "//%": return Math.floor(a / b) % c;
      case "max": return Math.max(...values);
      case "min": return Math.min(...values);
      default: throw new Error(`unknown operator ${operator}`);
    }
  }

  // Bytes of each category at each step, and all of them together.
  function memory(step, sizes) {
    const bytes = data.sizes.map((size) => Math.round(evaluate(size, sizes)));
    const length = step.points.operator.length;
    const layers = data.categories.map(() => new Float64Array(length + 1));
    const lives = step.lives;
    for (let i = 0; i < lives.size.length; i++) {
      const layer = layers[lives.category[i]];
      layer[lives.born[i]] += bytes[lives.size[i]];
      layer[lives.dies[i] + 1] -= bytes[lives.size[i]];
    }
    const total = new Float64Array(length);
    layers.forEach((layer, category) => {
      let held = 0;
      for (let i = 0; i < length; i++) {
        held += layer[i];
        const works = category === data.workspace ? bytes[step.points.workspace[i]] : 0;
        layer[i] = held + works;
        total[i] += layer[i];
      }
    });
    let peak = 0;
    for (let i = 1; i < length; i++) if (total[i] > total[peak]) peak = i;
    return { bytes, layers, total, peak, most: length ? total[peak] : 0 };
  }

  const steps = ["before", "after"];
  const now = {};
  function compute() {
    for (const step of steps) now[step] = memory(data[step], state.sizes);
  }

  // The largest size of one symbol that keeps the budget, the others as they are; 0 if none does.
  function largest(symbol, limit) {
    const fits = (size) => {
      const sizes = state.sizes.slice();
      sizes[symbol] = size;
      return memory(data.after, sizes).most <= data.budget;
    };
    let low = 0;
    let high = limit + 1;
    while (high - low > 1) {
      const middle = Math.floor((low + high) / 2);
      if (fits(middle)) low = middle;
      else high = middle;
    }
    return low;
  }

  const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
  function shown(bytes) {
    const unit = UNITS.find(([, size]) => Math.abs(bytes) >= size);
    return unit ? `${(bytes / unit[1]).toFixed(2)} ${unit[0]}` : `${bytes} bytes`;
  }
  const exact = (bytes) => `${bytes.toLocaleString("en")} bytes`;

  // -- Building elements ---------------------------------------------------------------------------

  function element(name, content, attributes = {}) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // -- Sliders ---------------------------------------------------------------------------------------

  function makeControls() {
    const place = byId("controls");
    data.symbols.forEach((symbol, index) => {
      const most = Math.max(8 * symbol.size, 16);
      const label = element("label", `${symbol.name} = `);
      const bounds = { min: 1, max: most, step: 1, "aria-label": symbol.name };
      const number = element("input", undefined, { type: "number", min: 1, step: 1, "aria-label": symbol.name });
      const range = element("input", undefined, { type: "range", ...bounds });
      const note = element("span", "", { class: "note" });
      const set = (value) => {
        const size = Math.max(1, Math.round(Number(value)) || 1);
        state.sizes[index] = size;
        refresh();
      };
      range.addEventListener("input", () => set(range.value));
      number.addEventListener("change", () => set(number.value));
      label.append(number, " ", range, " ", note);
      place.append(label);
      symbol.show = () => {
        range.value = state.sizes[index];
        number.value = state.sizes[index];
        if (data.budget === null) return;
        const fitting = largest(index, most);
        const more = fitting === most ? " or more" : "";
        note.textContent = fitting ? `this plan fits up to ${fitting}${more}` : "this plan fits at no size";
        note.dataset.largest = fitting;
      };
    });
    if (data.symbols.length) {
      byId("fixed").hidden = false;
      const reset = element("button", "Sizes of the example", { type: "button" });
      reset.addEventListener("click", () => {
        state.sizes = data.symbols.map((symbol) => symbol.size);
        refresh();
      });
      place.append(reset);
    }
  }

  // `#B=16&S=64&view=before` sets the page up, so that a state can be linked to.
  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    data.symbols.forEach((symbol, index) => {
      const size = Number(given.get(symbol.name));
      if (Number.isInteger(size) && size > 0) state.sizes[index] = size;
    });
    if (steps.includes(given.get("view"))) state.view = given.get("view");
    if (given.has("filter")) state.filter = given.get("filter");
    byId("filter").value = state.filter;
    const [key, way] = (given.get("sort") || "").split(",");
    if (key) state.sort.storages = [key, way === "up" ? 1 : -1];
  }

  // -- The chart -------------------------------------------------------------------------------------

  const LEFT = 76;
  const RIGHT = 12;
  const TOP = 10;
  const BOTTOM = 22;

  function prepared(canvas, height) {
    const width = canvas.clientWidth || 900;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "12px system-ui, sans-serif";
    return { context, width, height };
  }

  const lateFrom = (step) => {
    const at = data[step].points.phase.indexOf(2);
    return at < 0 ? data[step].points.phase.length : at;
  };

  // The two steps differ in length; each phase of one lies over the same phase of the other.
  function across(step, width) {
    const length = data[step].points.operator.length;
    const late = lateFrom(step);
    const shared = lateFrom(state.view) / Math.max(1, data[state.view].points.operator.length);
    const middle = LEFT + (width - LEFT - RIGHT) * shared;
    const end = width - RIGHT;
    return (position) => position <= late
      ? LEFT + ((middle - LEFT) * position) / Math.max(1, late)
      : middle + ((end - middle) * (position - late)) / Math.max(1, length - late);
  }

  function drawChart() {
    const { context, width, height } = prepared(byId("chart"), 320);
    const view = now[state.view];
    const other = state.view === "after" ? "before" : "after";
    const top = Math.max(now.before.most, now.after.most, data.budget || 0, 1) * 1.04;
    const x = across(state.view, width);
    const y = (bytes) => TOP + (height - TOP - BOTTOM) * (1 - bytes / top);
    drawAxes(context, width, height, top, y, x);
    const length = view.total.length;
    let below = new Float64Array(length);
    view.layers.forEach((layer, category) => {
      const above = below.map((bytes, i) => bytes + layer[i]);
      context.beginPath();
      for (let i = 0; i < length; i++) {
        context.lineTo(x(i), y(above[i]));
        context.lineTo(x(i + 1), y(above[i]));
      }
      for (let i = length - 1; i >= 0; i--) {
        context.lineTo(x(i + 1), y(below[i]));
        context.lineTo(x(i), y(below[i]));
      }
      context.closePath();
      context.fillStyle = data.colours[category];
      context.fill();
      below = above;
    });
    outline(context, now[other].total, across(other, width), y, GHOST, [4, 3]);
    if (data.budget !== null) line(context, LEFT, width - RIGHT, y(data.budget), BUDGET);
    context.strokeStyle = "#000000";
    context.beginPath();
    context.moveTo(x(view.peak + 0.5), TOP);
    context.lineTo(x(view.peak + 0.5), height - BOTTOM);
    context.setLineDash([1, 2]);
    context.stroke();
    context.setLineDash([]);
  }

  function drawAxes(context, width, height, top, y, x) {
    context.fillStyle = "#222222";
    context.textAlign = "right";
    const rough = top / 6;
    const unit = UNITS.find(([, size]) => top >= 2 * size) || ["bytes", 1];
    const power = 10 ** Math.floor(Math.log10(rough / unit[1]));
    const tick = [1, 2, 5, 10].map((n) => n * power * unit[1]).find((n) => n >= rough) || rough;
    for (let bytes = 0; bytes <= top; bytes += tick) {
      const figure = (bytes / unit[1]).toLocaleString("en", { maximumFractionDigits: 3 });
      context.fillText(`${figure} ${unit[0]}`, LEFT - 6, y(bytes) + 4);
      line(context, LEFT, width - RIGHT, y(bytes), "#eeeeee");
    }
    context.fillStyle = "#222222";
    context.textAlign = "left";
    context.fillText("forward", LEFT, height - 6);
    context.fillText("backward", x(lateFrom(state.view)), height - 6);
  }

  function line(context, from, to, height, colour) {
    context.strokeStyle = colour;
    context.lineWidth = colour === BUDGET ? 2 : 1;
    context.beginPath();
    context.moveTo(from, height);
    context.lineTo(to, height);
    context.stroke();
    context.lineWidth = 1;
  }

  function outline(context, total, x, y, colour, dash) {
    context.strokeStyle = colour;
    context.setLineDash(dash);
    context.beginPath();
    for (let i = 0; i < total.length; i++) {
      context.lineTo(x(i), y(total[i]));
      context.lineTo(x(i + 1), y(total[i]));
    }
    context.stroke();
    context.setLineDash([]);
  }

  function legend() {
    const place = byId("legend");
    place.replaceChildren();
    data.categories.forEach((category, index) => {
      if (!now[state.view].layers[index].some((bytes) => bytes > 0)) return;
      const mark = element("i");
      mark.style.background = data.colours[index];
      const label = element("span");
      label.append(mark, category);
      place.append(label);
    });
    const other = state.view === "after" ? "before" : "after";
    place.append(element("span", `dashed: ${other}`));
    if (data.budget !== null) place.append(element("span", "orange line: budget"));
  }

  // -- Lifetimes ---------------------------------------------------------------------------------------

  const ROW = 12;
  const MOST_BARS = 400;
  let bars = [];

  function chooseBars() {
    const lives = data[state.view].lives;
    const bytes = now[state.view].bytes;
    const order = lives.size.map((_, i) => i).filter((i) => bytes[lives.size[i]] > 0);
    order.sort((a, b) => bytes[lives.size[b]] - bytes[lives.size[a]] || a - b);
    const kept = order.slice(0, MOST_BARS);
    const first = new Map();
    for (const i of kept) {
      const module = lives.module[i];
      first.set(module, Math.min(first.get(module) ?? Infinity, lives.born[i]));
    }
    kept.sort((a, b) => stays(lives, a) - stays(lives, b) || first.get(lives.module[a]) - first.get(lives.module[b])
      || lives.module[a] - lives.module[b] || lives.born[a] - lives.born[b] || a - b);
    bars = kept;
  }

  // Is the storage there before the step and after it?  Such bars tell least, so they come last.
  const stays = (lives, i) => ["parameters", "buffers", "inputs", "constants"].includes(data.categories[lives.category[i]]);

  function drawBars() {
    chooseBars();
    const canvas = byId("bars");
    const height = Math.max(ROW, bars.length * ROW);
    canvas.style.height = `${height}px`;
    const { context, width } = prepared(canvas, height);
    const lives = data[state.view].lives;
    const x = across(state.view, width);
    context.textAlign = "right";
    bars.forEach((i, row) => {
      const from = x(lives.born[i]);
      const thin = lives.origin[i] >= 0;
      context.fillStyle = data.colours[lives.category[i]];
      context.fillRect(from, row * ROW + (thin ? 4 : 2), Math.max(1, x(lives.dies[i] + 1) - from), ROW - (thin ? 7 : 3));
      const module = lives.module[i];
      if (row === 0 || lives.module[bars[row - 1]] !== module) {
        context.fillStyle = "#222222";
        context.fillText((text(module) || "(root)").slice(-11), LEFT - 6, row * ROW + 10);
      }
    });
  }

  // -- What is under the pointer ---------------------------------------------------------------------

  function details(entries) {
    const list = element("dl");
    for (const [name, value] of entries) {
      if (value === "" || value === undefined) continue;
      list.append(element("dt", name), element("dd", value));
    }
    byId("details").replaceChildren(list);
  }

  function tellStep(index) {
    const points = data[state.view].points;
    const view = now[state.view];
    const phase = ["forward", "between", "backward"][points.phase[index]];
    const held = data.categories
      .map((name, category) => [name, view.layers[category][index]])
      .filter(([, bytes]) => bytes > 0)
      .map(([name, bytes]) => `${name} ${shown(bytes)}`);
    details([
      ["step", `${index} of ${points.operator.length}, ${phase}: ${text(points.operator[index])}`],
      ["module", text(points.module[index])],
      ["source", text(points.source[index])],
      ["live", `${shown(view.total[index])} (${exact(view.total[index])})`],
      ["of it", held.join(", ")],
    ]);
  }

  function tellStorage(index) {
    const lives = data[state.view].lives;
    const bytes = now[state.view].bytes[lives.size[index]];
    const decision = data.decisions[lives.decision[index]];
    details([
      ["storage", text(lives.name[index])],
      ["type", text(lives.type[index])],
      ["bytes", `${shown(bytes)} (${exact(bytes)})`],
      ["formula", data.formulas[lives.size[index]]],
      ["lives", `from step ${lives.born[index]} to ${lives.dies[index]}`],
      ["category", data.categories[lives.category[index]]],
      ["made again for", text(lives.origin[index])],
      ["decision", decision && `${decision.action}: ${decision.reason}`],
      ["module", text(lives.module[index])],
      ["source", text(lives.source[index])],
    ]);
  }

  function listen() {
    const chart = byId("chart");
    const stepAt = (event) => {
      const box = chart.getBoundingClientRect();
      const x = across(state.view, box.width);
      const at = event.clientX - box.left;
      const length = data[state.view].points.operator.length;
      let low = 0;
      let high = length;
      while (high - low > 1) {
        const middle = Math.floor((low + high) / 2);
        if (x(middle) <= at) low = middle;
        else high = middle;
      }
      return low;
    };
    chart.addEventListener("mousemove", (event) => state.pinned || tellStep(stepAt(event)));
    chart.addEventListener("click", (event) => pin(() => tellStep(stepAt(event))));
    const canvas = byId("bars");
    const barAt = (event) => {
      const row = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / ROW);
      return bars[Math.min(Math.max(row, 0), bars.length - 1)];
    };
    canvas.addEventListener("mousemove", (event) => {
      const index = barAt(event);
      if (!state.pinned && index !== undefined) tellStorage(index);
    });
    canvas.addEventListener("click", (event) => {
      const index = barAt(event);
      if (index !== undefined) pin(() => tellStorage(index));
    });
    byId("filter").addEventListener("input", (event) => {
      state.filter = event.target.value;
      storages();
    });
    byId("more").addEventListener("click", () => {
      state.all = true;
      storages();
    });
    window.addEventListener("resize", draw);
    window.addEventListener("hashchange", () => {
      readHash();
      refresh();
    });
  }

  function pin(tell) {
    if (state.pinned) {
      state.pinned = null;
      return;
    }
    tell();
    state.pinned = tell;
  }

  // -- Tables --------------------------------------------------------------------------------------------

  // columns: [key, heading, is a number, what a row shows].
  function table(id, columns, rows, clicked) {
    const [key, way] = state.sort[id];
    const sorted = columns.some(([name]) => name === key) ? rows.slice().sort((a, b) => {
      const [p, q] = [a[key], b[key]];
      const order = typeof p === "number" && typeof q === "number" ? p - q : String(p) < String(q) ? -1 : String(p) > String(q) ? 1 : 0;
      return way * order || a.index - b.index;
    }) : rows;
    const head = element("tr");
    for (const [name, heading, isNumber] of columns) {
      const cell = element("th", undefined, isNumber ? { class: "number" } : {});
      const mark = name === key ? (way < 0 ? " ▾" : " ▴") : "";
      const button = element("button", heading + mark, { type: "button" });
      button.addEventListener("click", () => {
        state.sort[id] = [name, name === key ? -way : isNumber ? -1 : 1];
        tables();
      });
      if (name === key) cell.setAttribute("aria-sort", way < 0 ? "descending" : "ascending");
      cell.append(button);
      head.append(cell);
    }
    const body = element("tbody");
    for (const row of sorted) {
      const tr = element("tr");
      for (const [name, , isNumber, show] of columns) {
        tr.append(element("td", show ? show(row) : row[name], isNumber ? { class: "number" } : {}));
      }
      if (clicked) tr.addEventListener("mouseenter", () => state.pinned || clicked(row));
      body.append(tr);
    }
    const top = element("thead");
    top.append(head);
    byId(id).replaceChildren(top, body);
  }

  const MOST_ROWS = 200;
  const bytesOf = (row) => row.bytes.toLocaleString("en");

  function storages() {
    const lives = data[state.view].lives;
    const { bytes, peak } = now[state.view];
    const wanted = state.filter.toLowerCase();
    let rows = lives.size.map((size, index) => ({
      index,
      name: text(lives.name[index]),
      type: text(lives.type[index]),
      bytes: bytes[size],
      born: lives.born[index],
      dies: lives.dies[index],
      live: lives.born[index] <= peak && peak <= lives.dies[index] ? "yes" : "",
      category: data.categories[lives.category[index]],
      decision: lives.decision[index] < 0 ? "" : data.decisions[lives.decision[index]].action,
      module: text(lives.module[index]),
      source: text(lives.source[index]),
    }));
    if (wanted) {
      rows = rows.filter((row) => [row.name, row.type, row.category, row.decision, row.module, row.source]
        .some((value) => value.toLowerCase().includes(wanted)));
    }
    const [key, way] = state.sort.storages;
    const found = rows.length;
    if (!state.all && found > MOST_ROWS) {
      rows.sort((a, b) => way * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) || a.index - b.index);
      rows = rows.slice(0, MOST_ROWS);
    }
    byId("count").textContent = `${rows.length} of ${found}`;
    byId("more").hidden = rows.length === found;
    table("storages", [
      ["name", "storage"], ["type", "type"], ["bytes", "bytes", true, bytesOf],
      ["born", "born", true], ["dies", "dies", true], ["live", "at the peak"],
      ["category", "category"], ["decision", "decision"], ["module", "module"], ["source", "source"],
    ], rows, (row) => tellStorage(row.index));
  }

  function decisions() {
    byId("decided").hidden = !data.decisions.length;
    const rows = data.decisions.map((decision, index) => ({ ...decision, index }));
    table("decisions", [
      ["value", "value"], ["type", "type"], ["bytes", "bytes", true, bytesOf],
      ["action", "decision"], ["times", "times", true], ["ms", "added ms", true, (row) => row.ms.toFixed(3)],
      ["module", "module"], ["source", "source"], ["reason", "reason"],
    ], rows);
  }

  function changes() {
    if (!data.changes) return;
    byId("compared").hidden = false;
    byId("totals").textContent = data.changes.totals;
    const rows = data.changes.rows.map((row, index) => ({ ...row, index }));
    table("changes", [
      ["value", "value"], ["bytes", "bytes", true, bytesOf], ["from", "this plan"], ["to", "the other"],
      ["module", "module"], ["source", "source"],
    ], rows);
  }

  function tables() {
    storages();
    decisions();
    changes();
  }

  // -- All together -----------------------------------------------------------------------------------

  function views() {
    const place = byId("views");
    place.replaceChildren();
    for (const step of steps) {
      const button = element("button", `stack what is live ${step}`, { type: "button", "aria-pressed": step === state.view });
      button.addEventListener("click", () => {
        state.view = step;
        refresh();
      });
      place.append(button, " ");
    }
  }

  function verdict() {
    const place = byId("verdict");
    const { before, after } = now;
    let words = `peak ${shown(after.most)}, ${shown(before.most)} with everything kept`;
    let over = false;
    if (data.budget !== null) {
      over = after.most > data.budget;
      const rest = Math.abs(data.budget - after.most);
      words += over ? `: ${shown(rest)} over the budget of ${shown(data.budget)}` : `: fits the budget of ${shown(data.budget)}, ${shown(rest)} to spare`;
    }
    place.textContent = words;
    place.className = over ? "over" : "fits";
    place.dataset.before = before.most;
    place.dataset.after = after.most;
    place.dataset.fits = String(!over);
  }

  function draw() {
    drawChart();
    drawBars();
  }

  function refresh() {
    compute();
    for (const symbol of data.symbols) symbol.show();
    verdict();
    views();
    legend();
    draw();
    tables();
  }

  readHash();
  makeControls();
  listen();
  refresh();
  document.documentElement.dataset.ready = "yes";
})();

"use strict";
// The map of one head: which parts of the text a token reads, drawn from the report in this page.
(function () {
  const report = JSON.parse(document.getElementById("report").textContent);
  const map = report.map, pieces = report.pieces, at = { layer: 0, head: 0, row: map.rows.length - 1, part: 0 };
  const byId = (id) => document.getElementById(id);
  const canvas = byId("map"), readout = byId("told"), text = byId("text"), numbers = byId("parts");
  const count = Math.ceil(map.tokens / map.part);
  const head = () => map.layers[at.layer].heads[at.head];
  const percent = (share) => (share / 100).toFixed(share >= 1000 || share === 0 ? 0 : 2) + " %";
  const range = (part) => {
    const end = Math.min((part + 1) * map.part, map.tokens) - 1;
    return part * map.part === end ? String(end) : part * map.part + "-" + end;
  };
  const shown = (string) => string.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/[\u0000-\u001f\u007f-\u009f]/g, "\ufffd");
  const kind = () => document.querySelector("input[name=kind]:checked").value;
  const share = (part) => head().parts[at.row].find((entry) => entry[0] === part) || [part, 0, 0, 0, 0];

  // Colours of the page as it is now, light or dark.
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Small shares would not be seen at all if they were drawn in proportion.
  const strength = (value) => (value === 0 ? 0 : 0.12 + 0.88 * Math.sqrt(value / 10000));

  function draw() {
    const width = 720, cell = width / count, rows = map.rows.length;
    const height = Math.max(140, Math.min(520, Math.round(rows * Math.max(cell * 0.75, 8))));
    const scale = Math.max(1, Math.min(3, window.devicePixelRatio || 1)), tall = height / rows;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const exact = color("--exact"), far = color("--far"), full = color("--full"), mode = kind();
    const fill = (rgb, alpha, x, y, w, h) => {
      pen.fillStyle = "rgba(" + rgb + "," + alpha + ")";
      pen.fillRect(x, y, w, h);
    };
    for (let row = 0; rows > row; row++) {
      const y = row * tall, last = Math.floor(map.rows[row] / map.part);
      // What lies behind the token.
      fill("128,128,128", 0.16, (last + 1) * cell, y, width, tall);
      for (const [part, keys, near, rest, truth] of head().parts[row]) {
        const x = part * cell;
        if (mode === "full") {
          fill(full, strength(truth), x, y, cell, tall);
        } else if (mode === "apart") {
          const more = near + rest - truth;
          fill(more > 0 ? exact : far, strength(Math.abs(more)), x, y, cell, tall);
        } else {
          // Above what is read exactly, below what counts through statistics; alone each has the whole cell.
          const both = keys > 0 && rest > 0, half = both ? tall / 2 : tall;
          if (keys > 0) { fill(exact, Math.max(0.1, strength(near)), x, y, cell, half); }
          if (rest > 0) { fill(far, strength(rest), x, y + (both ? half : 0), cell, half); }
        }
      }
    }
    pen.strokeStyle = color("--focus");
    pen.lineWidth = 2;
    pen.strokeRect(1, at.row * tall + 0.5, width - 2, Math.max(2, tall - 1));
    pen.lineWidth = 3;
    pen.strokeRect(at.part * cell, at.row * tall, cell, tall);
  }

  function tell() {
    const token = map.rows[at.row], [part, keys, near, rest, truth] = share(at.part);
    readout.textContent = "Token " + token + " (" + shown(report.row_pieces[at.row]) + ") of part " + range(part) + ": " + keys +
      " keys exactly, " + percent(near) + "; statistics " + percent(rest) + "; full attention " + percent(truth);
  }

  function spans() {
    pieces.forEach((piece, part) => {
      const span = document.createElement("span");
      span.textContent = piece;
      span.dataset.part = part;
      span.title = "tokens " + range(part);
      text.append(span);
    });
  }

  function mark() {
    const entries = new Map(head().parts[at.row].map((entry) => [entry[0], entry]));
    const last = Math.floor(map.rows[at.row] / map.part), mode = kind();
    for (const span of text.children) {
      const part = Number(span.dataset.part), entry = entries.get(part);
      span.className = part > last ? "later" : "";
      span.style.background = "";
      if (part === last) { span.classList.add("here"); }
      if (!entry) { continue; }
      const [, keys, near, rest, truth] = entry;
      if (keys > 0) { span.classList.add("exact"); } else if (rest > 0) { span.classList.add("far"); }
      const [rgb, value] = mode === "full" ? ["--full", truth] : near >= rest ? ["--exact", near] : ["--far", rest];
      span.style.background = "rgba(" + color(rgb) + "," + 0.75 * strength(value) + ")";
    }
    const looked = text.children[at.part], top = looked.offsetTop - text.clientHeight / 3;
    if (text.scrollTop > looked.offsetTop || looked.offsetTop > text.scrollTop + text.clientHeight) { text.scrollTop = top; }
  }

  function list() {
    const rows = head().parts[at.row].slice().sort((a, b) => Math.max(b[2] + b[3], b[4]) - Math.max(a[2] + a[3], a[4]) || a[0] - b[0]);
    numbers.replaceChildren();
    for (const [part, keys, near, rest, truth] of rows) {
      const line = document.createElement("tr"), snippet = shown(pieces[part]);
      const cells = [range(part), String(keys), percent(near), percent(rest), percent(truth), snippet.slice(0, 60) + (snippet.length > 60 ? "\u2026" : "")];
      cells.forEach((cell, column) => {
        const box = document.createElement(column === 0 ? "th" : "td");
        box.textContent = cell;
        if (column === 5) { box.className = "words"; }
        line.append(box);
      });
      numbers.append(line);
    }
    const own = head(), r = at.row, layer = map.layers[at.layer];
    byId("sums").textContent = "Layer " + layer.layer + ", head " + at.head + ", token " + map.rows[r] + " (" + shown(report.row_pieces[r]) + "): " +
      own.near_keys[r] + " keys read anyway hold " + percent(own.near[r]) + ", " + own.chosen_keys[r] + " chosen " + percent(own.chosen[r]) + ", " +
      own.runs[r] + " statistics " + percent(own.statistics[r]) + (own.sink ? ", the sink " + percent(own.sink[r]) : "") + ". Full attention gives " + percent(own.covered[r]) +
      " to the keys that are read exactly; by part the two lie " + percent(own.apart[r]) + " apart.";
  }

  function show() {
    for (const cell of document.querySelectorAll("table.heads [data-r]")) {
      const chosen = Number(cell.dataset.r) === at.layer ? Number(cell.dataset.c) === at.head : false;
      cell.setAttribute("aria-selected", String(chosen));
      cell.setAttribute("tabindex", chosen ? "0" : "-1");
    }
    byId("which").textContent = "Layer " + map.layers[at.layer].layer + ", head " + at.head;
    byId("row").value = at.row;
    draw();
    tell();
    mark();
    list();
  }

  function move(row, part) {
    at.row = Math.max(0, Math.min(map.rows.length - 1, row));
    at.part = Math.max(0, Math.min(count - 1, part));
    show();
  }

  map.rows.forEach((position, row) => {
    const option = document.createElement("option");
    option.value = row;
    option.textContent = position + ": " + shown(report.row_pieces[row]);
    byId("row").append(option);
  });
  byId("row").addEventListener("change", (event) => move(Number(event.target.value), at.part));
  for (const input of document.querySelectorAll("input[name=kind]")) { input.addEventListener("change", show); }
  byId("of").addEventListener("change", (event) => {
    for (const table of document.querySelectorAll("figure[data-of]")) { table.hidden = table.dataset.of !== event.target.value; }
  });
  for (const cell of document.querySelectorAll("table.heads [data-r]")) {
    const choose = () => { at.layer = Number(cell.dataset.r); at.head = Number(cell.dataset.c); show(); };
    cell.addEventListener("focus", choose);
    cell.addEventListener("click", choose);
  }
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) { return; }
    event.preventDefault();
    move(at.row + step[0], at.part + step[1]);
  });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    move(Math.floor((event.clientY - box.top) / box.height * map.rows.length), Math.floor((event.clientX - box.left) / box.width * count));
  });
  text.addEventListener("click", (event) => {
    const span = event.target.closest("[data-part]");
    if (!span) { return; }
    const part = Number(span.dataset.part), row = map.rows.findIndex((position) => position >= part * map.part);
    move(0 > row ? map.rows.length - 1 : row, part);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  // The head that chooses most is the one to look at first.
  let most = -1;
  map.layers.forEach((layer, number) => layer.heads.forEach((own, which) => {
    const sum = own.chosen.reduce((all, one) => all + one, 0);
    if (sum > most) { most = sum; at.layer = number; at.head = which; }
  }));
  spans();
  at.part = Math.floor(map.rows[at.row] / map.part);
  show();
})();

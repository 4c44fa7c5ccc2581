/* The canvas of the Compose tab: boxes and masks over the picture. Fractions of the canvas everywhere; a concept is
   known by its place in the list, which is also its colour, here, on its card and on the sheet. */
(() => {
  "use strict";
  const { el, copy } = window.intarsia;
  const MOST = 10;            // concepts
  const CELLS = 16;           // of the grid that boxes snap to
  const NEAR = 7;             // pixels from which an edge snaps
  const LEAST = 0.03;         // smallest side of a box
  const STEP = 0.01;          // of an arrow key
  const KEPT = 100;           // changes that can be undone
  const SAME = 1200;          // milliseconds in which typing into one field is one change
  const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
  const STANDARD = [0.3125, 0.3125, 0.6875, 0.6875];   // a box nobody has drawn
  const ICONS = {
    box: "M4 4h12v12H4Z", undo: "M7 4 3.5 7.5 7 11M4 7.5h7a4.5 4.5 0 0 1 0 9H7",
    redo: "M13 4l3.5 3.5L13 11M16 7.5H9a4.5 4.5 0 0 0 0 9h4", snap: "M3 7h14M3 13h14M7 3v14M13 3v14",
    picture: "M3.5 4.5h13v11h-13ZM4 14l4-4.5 3 3 2-2 3 3.5M12.8 7.6h.01",
    boxes: "M3.5 3.5h8v8h-8ZM8.5 8.5h8v8h-8Z",
  };

  const round = (share) => Math.round(share * 1e4) / 1e4;
  const clamp = (share) => Math.min(1, Math.max(0, share));
  const percent = (share) => `${Math.round(share * 100)} %`;

  /* What all parts of the tab share: the board's value and everything that can be done to it. */
  const state = {
    props: null, trigger: () => {}, selected: -1, painting: -1, frame: { width: 1, height: 1 },
    under: { src: "", live: false }, past: [], future: [], drawers: [], last: { key: "", time: 0 }, known: "",
    snap: true, showBoxes: true, showPicture: true,
  };
  const concepts = () => state.props?.value?.concepts ?? [];
  const draw = (cards = true) => { for (const one of state.drawers) one(cards); };
  const called = (concept, index) => concept.name || concept.adapter || `Concept ${index + 1}`;

  function remember() {
    state.past.push(JSON.stringify(state.props.value));
    if (state.past.length > KEPT) state.past.shift();
    state.future = [];
  }
  function put(value) {
    state.known = JSON.stringify(value);
    state.props.value = value;
  }
  /* Change the concepts; changes with the same `key` shortly after each other are undone together. */
  function commit(change, { key = "", cards = true } = {}) {
    const now = Date.now();
    if (!key || key !== state.last.key || now - state.last.time > SAME) remember();
    state.last = { key, time: now };
    const value = copy(state.props.value);
    change(value.concepts, value);
    put(value);
    state.selected = Math.min(state.selected, value.concepts.length - 1);
    if (state.painting >= value.concepts.length) state.painting = -1;
    draw(cards);
  }
  function travel(from, to) {
    if (!from.length) return;
    to.push(JSON.stringify(state.props.value));
    put(JSON.parse(from.pop()));
    state.last.key = "";
    state.selected = Math.min(state.selected, concepts().length - 1);
    if (state.painting >= concepts().length) state.painting = -1;
    draw();
  }
  const undo = () => travel(state.past, state.future);
  const redo = () => travel(state.future, state.past);

  function select(index, focus = "") {
    if (state.painting >= 0 && state.painting !== index) state.painting = -1;
    state.selected = index;
    draw();
    if (focus) document.querySelector(focus)?.focus({ preventScroll: focus.startsWith("#compose-board") });
  }

  const blank = () => ({
    adapter: "", weight: 1, blocks: {}, first: 0, last: 1, name: "", prompt: "", words: "", box: null, mask: "",
    order: 0, trigger: "", note: "",
  });
  const top = (all) => Math.max(0, ...all.map((concept) => concept.order));

  function add(fields = {}) {
    if (concepts().length >= MOST) return false;
    commit((all) => { all.push({ ...blank(), order: top(all), ...fields }); });
    select(concepts().length - 1);
    return true;
  }
  function freeName(all, index) {
    const concept = all[index];
    const others = new Set(all.filter((_, other) => other !== index).map((one) => one.name || one.adapter));
    const name = concept.name || concept.adapter;
    if (!name || !others.has(name)) return concept.name;
    const stem = name.replace(/ \d+$/, "");
    let number = 2;
    while (others.has(`${stem} ${number}`)) number += 1;
    return `${stem} ${number}`;
  }
  /* An adapter of the library becomes a concept's own. */
  function assign(index, entry) {
    commit((all) => {
      const concept = all[index];
      const typed = concept.prompt && concept.prompt !== concept.trigger;
      Object.assign(concept, { adapter: entry.adapter, trigger: entry.trigger, note: entry.note, blocks: {} });
      if (!typed) concept.prompt = entry.trigger;
      concept.name = freeName(all, index);
    });
    select(index);
  }
  function duplicate(index) {
    if (concepts().length >= MOST) return;
    commit((all) => {
      const twin = copy(all[index]);
      if (twin.box) {
        const [left, up, right, down] = twin.box;
        const by = [Math.min(0.04, 1 - right), Math.min(0.04, 1 - down)];
        twin.box = [left + by[0], up + by[1], right + by[0], down + by[1]].map(round);
      }
      all.push(Object.assign(twin, { order: top(all) }));
      twin.name = freeName(all, all.length - 1);
    });
    select(concepts().length - 1);
  }
  function remove(index) {
    commit((all) => { all.splice(index, 1); });
    select(Math.min(index, concepts().length - 1));
  }
  /* From the lowest to the highest, as places in the list. */
  const ranks = () => concepts().map((concept, index) => [concept.order, index])
    .sort((one, other) => one[0] - other[0] || one[1] - other[1]).map(([, index]) => index);
  function raise(index, by) {
    const sorted = ranks();
    const at = sorted.indexOf(index);
    const other = at + by;
    if (other < 0 || other >= sorted.length) return;
    [sorted[at], sorted[other]] = [sorted[other], sorted[at]];
    commit((all) => { sorted.forEach((place, rank) => { all[place].order = rank; }); });
  }
  function setBox(index, box, key = "") {
    commit((all) => { all[index].box = box?.map(round) ?? null; }, { key, cards: !key });
  }
  /* Where a concept is: "box", "brush" or "none". */
  function place(index, kind) {
    const concept = concepts()[index];
    if (kind === "brush") { state.selected = index; state.painting = index; draw(); return; }
    state.painting = -1;
    if (kind === "box") commit((all) => Object.assign(all[index], { mask: "", box: concept.box ?? [...STANDARD] }));
    else commit((all) => Object.assign(all[index], { mask: "", box: null }));
  }

  /* The canvas itself */
  function board(element, props, trigger, watch, upload) {
    state.props = props;
    state.trigger = trigger;
    state.known = JSON.stringify(props.value);
    const root = element.querySelector(".board");
    const bar = el("div", "board-bar");
    bar.setAttribute("role", "toolbar");
    bar.setAttribute("aria-label", "Canvas");
    const well = el("div", "board-well");
    const area = el("div", "board-canvas");
    area.setAttribute("role", "group");
    area.setAttribute("aria-label", "Canvas: drag to draw a box, arrow keys move the chosen one");
    const picture = el("img", "under");
    picture.alt = "The picture drawn";
    picture.draggable = false;
    const grid = el("div", "board-grid");
    const masks = el("div", "board-masks");
    const boxes = el("div", "board-boxes");
    const grips = el("div", "grips");   // of the chosen box, above all others: what lies on top may hide the box itself
    for (const handle of HANDLES) {
      const grip = el("i", `handle ${handle}`);
      grip.dataset.handle = handle;
      grips.append(grip);
    }
    const guides = el("div", "board-guides");
    const sheet = el("canvas", "paint");
    const brush = el("div", "brush-ring");
    const hint = el("div", "board-hint");
    hint.append(el("b", "", "Draw a box with the mouse"),
      el("span", "", "Each box is a concept. Give it an adapter: drop one on it, or drag one from the list."));
    area.append(picture, grid, masks, boxes, grips, guides, sheet, brush, hint);
    well.append(area);
    root.replaceChildren(bar, well);

    const at = (event) => {
      const frame = area.getBoundingClientRect();
      return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
    };

    /* Snapping: the smallest shift that brings one of the edges to the grid or to another box's edge. */
    const near = (axis) => NEAR / area.getBoundingClientRect()[axis ? "height" : "width"];
    const edgesOf = (axis, except) => concepts().flatMap((concept, index) =>
      concept.box && index !== except ? [concept.box[axis], concept.box[axis + 2]] : []);
    function shift(axis, edges, except, off) {
      if (off || !state.snap) return { by: 0, line: null };
      let best = { by: 0, line: null, distance: near(axis) };
      const others = edgesOf(axis, except);
      for (const edge of edges) {
        const cell = Math.round(edge * CELLS) / CELLS;
        for (const [target, line] of [...others.map((other) => [other, true]), [cell, false]]) {
          const distance = Math.abs(target - edge);
          if (distance < best.distance) best = { by: target - edge, line: line ? target : null, distance };
        }
      }
      return best;
    }
    function guide(lines) {
      guides.replaceChildren(...lines.flatMap((line, axis) => {
        if (line === null) return [];
        const node = el("i", axis ? "across" : "down");
        node.style[axis ? "top" : "left"] = `${100 * line}%`;
        return [node];
      }));
    }

    /* Dragging: what is happening, and the box it makes; committed when the button goes up. */
    let drag = null;
    function moved(box, by, event) {
      const [width, height] = [box[2] - box[0], box[3] - box[1]];
      const first = [Math.min(Math.max(box[0] + by[0], 0), 1 - width), Math.min(Math.max(box[1] + by[1], 0), 1 - height)];
      const size = [width, height];
      const lines = [0, 1].map((axis) => {
        const found = shift(axis, [first[axis], first[axis] + size[axis]], drag.index, event.altKey);
        first[axis] = Math.min(Math.max(first[axis] + found.by, 0), 1 - size[axis]);
        return found.line;
      });
      guide(lines);
      return [first[0], first[1], first[0] + width, first[1] + height];
    }
    function resized(box, handle, to, event) {
      const next = [...box];
      const lines = [null, null];
      const pull = (axis, side) => {
        const found = shift(axis, [to[axis]], drag.index, event.altKey);
        const edge = clamp(to[axis] + found.by);
        lines[axis] = found.line;
        next[axis + side] = side ? Math.max(edge, next[axis] + LEAST) : Math.min(edge, next[axis + 2] - LEAST);
      };
      if (handle.includes("w")) pull(0, 0);
      if (handle.includes("e")) pull(0, 2);
      if (handle.includes("n")) pull(1, 0);
      if (handle.includes("s")) pull(1, 2);
      guide(lines);
      return next;
    }
    function drawn(from, to, event) {
      const lines = [];
      const ends = [0, 1].map((axis) => {
        const start = from[axis] + shift(axis, [from[axis]], -1, event.altKey).by;
        const found = shift(axis, [to[axis]], -1, event.altKey);
        lines.push(found.line);
        return [clamp(start), clamp(to[axis] + found.by)].sort((one, other) => one - other);
      });
      guide(lines);
      return [ends[0][0], ends[1][0], ends[0][1], ends[1][1]];
    }
    area.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      if (state.painting >= 0) { paintDown(event); return; }
      const handle = event.target.closest(".handle")?.dataset.handle;
      const node = event.shiftKey ? null : event.target.closest(".box");   // with shift a new one, over others too
      event.preventDefault();
      area.setPointerCapture(event.pointerId);
      const from = at(event);
      if (handle || node) {
        const index = handle ? state.selected : Number(node.dataset.index);
        if (state.selected !== index) select(index);
        focusBox();
        drag = { kind: handle ? "size" : "move", handle, index, from, box: concepts()[index].box, next: null };
      } else {
        document.activeElement?.blur?.();
        drag = { kind: "draw", index: -1, from, next: null };
      }
    });
    area.addEventListener("pointermove", (event) => {
      if (state.painting >= 0) { paintMove(event); return; }
      if (!drag) return;
      const to = at(event);
      const by = [to[0] - drag.from[0], to[1] - drag.from[1]];
      if (!drag.next && Math.hypot(...by) < 0.006) return;
      drag.next = drag.kind === "move" ? moved(drag.box, by, event)
        : drag.kind === "size" ? resized(drag.box, drag.handle, to, event) : drawn(drag.from, to, event);
      drawBoxes();
    });
    const ended = (event) => {
      if (state.painting >= 0) { paintUp(event); return; }
      if (!drag) return;
      const { kind, index, next } = drag;
      drag = null;
      guide([null, null]);
      if (event.type === "pointercancel" || !next) {
        if (kind === "draw" && event.type !== "pointercancel") select(-1);
        drawBoxes();
      } else if (kind !== "draw") setBox(index, next);
      else if (next[2] - next[0] >= LEAST && next[3] - next[1] >= LEAST) {
        add({ box: next.map(round) });
        focusBox();
      } else drawBoxes();
    };
    area.addEventListener("pointerup", ended);
    area.addEventListener("pointercancel", ended);

    const focusBox = () => boxes.querySelector(`[data-index="${state.selected}"]`)?.focus({ preventScroll: true });
    area.addEventListener("keydown", (event) => {
      const node = event.target.closest(".box");
      if (event.key === "Escape") {
        if (drag) { drag = null; guide([null, null]); drawBoxes(); } else { state.painting = -1; select(-1); }
        return;
      }
      if (!node) return;
      const index = Number(node.dataset.index);
      const arrows = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
      const by = arrows[event.key];
      const control = event.ctrlKey || event.metaKey;
      if (by) {
        const box = [...concepts()[index].box];
        for (const axis of [0, 1]) {
          if (event.shiftKey) box[axis + 2] = Math.min(1, Math.max(box[axis] + LEAST, box[axis + 2] + by[axis]));
          else {
            const step = Math.min(Math.max(by[axis], -box[axis]), 1 - box[axis + 2]);
            box[axis] += step;
            box[axis + 2] += step;
          }
        }
        setBox(index, box, `arrows ${index}`);
      } else if (event.key === "Delete" || event.key === "Backspace") { remove(index); focusBox(); }
      else if (control && event.key.toLowerCase() === "d") { duplicate(index); focusBox(); }
      else if (event.key === "]") raise(index, 1);
      else if (event.key === "[") raise(index, -1);
      else if (event.key === "Enter") document.querySelector("#compose-cast .concept.open .add")?.focus();
      else return;
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input:not([type=range], [type=checkbox]), textarea");
      if (!area.offsetParent || typing || !(event.ctrlKey || event.metaKey)) return;
      const key = event.key.toLowerCase();
      if (key === "z") { event.preventDefault(); (event.shiftKey ? redo : undo)(); }
      if (key === "y") { event.preventDefault(); redo(); }
    });

    /* Painting a mask: strokes on a canvas of the picture's own size, kept as white on black. */
    const ink = sheet.getContext("2d", { willReadFrequently: true });
    const paint = { index: -1, mask: null, size: 0.12, erase: false, from: null };
    const side = () => Math.min(sheet.width, sheet.height);
    const colour = () => getComputedStyle(sheet).getPropertyValue("--c").trim();
    const tint = (pen, with_) => {   // keeps what is drawn and how opaque it is
      pen.globalCompositeOperation = "source-in";
      pen.fillStyle = with_;
      pen.fillRect(0, 0, sheet.width, sheet.height);
      pen.globalCompositeOperation = "source-over";
    };
    function openSheet() {
      const concept = concepts()[state.painting];
      const frame = state.frame;
      const scale = Math.min(1, 1024 / Math.max(frame.width, frame.height));
      const [width, height] = [Math.round(frame.width * scale), Math.round(frame.height * scale)];
      if (paint.index === state.painting && paint.mask === concept.mask && sheet.width === width
        && sheet.height === height) return;
      Object.assign(paint, { index: state.painting, mask: concept.mask });
      Object.assign(sheet, { width, height });   // also clears it
      if (!concept.mask) return;
      const image = new Image();
      image.addEventListener("load", () => {
        if (paint.mask !== concept.mask) return;
        ink.drawImage(image, 0, 0, width, height);
        const pixels = ink.getImageData(0, 0, width, height);
        for (let each = 0; each < pixels.data.length; each += 4) {
          pixels.data[each + 3] = pixels.data[each];
        }
        ink.putImageData(pixels, 0, 0);
        tint(ink, colour());
      });
      image.src = concept.mask;
    }
    function stroke(to) {
      const [from, x, y] = [paint.from ?? to, to[0] * sheet.width, to[1] * sheet.height];
      Object.assign(ink, { lineCap: "round", lineWidth: paint.size * side(), strokeStyle: colour() });
      ink.globalCompositeOperation = paint.erase ? "destination-out" : "source-over";
      ink.beginPath();
      ink.moveTo(from[0] * sheet.width, from[1] * sheet.height);
      ink.lineTo(x, y + 0.01);   // a point is a line too short to be drawn
      ink.stroke();
      ink.globalCompositeOperation = "source-over";
      paint.from = to;
    }
    function maskText() {
      const pixels = ink.getImageData(0, 0, sheet.width, sheet.height).data;
      if (!pixels.some((value, place) => place % 4 === 3 && value > 127)) return "";
      const out = el("canvas");
      Object.assign(out, { width: sheet.width, height: sheet.height });
      const pen = out.getContext("2d");
      pen.drawImage(sheet, 0, 0);
      tint(pen, "#fff");
      pen.globalCompositeOperation = "destination-over";
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, out.width, out.height);
      return out.toDataURL("image/png");
    }
    function ring(event) {
      const [x, y] = at(event);
      const frame = area.getBoundingClientRect();
      const width = paint.size * Math.min(frame.width, frame.height);
      Object.assign(brush.style, { left: `${100 * x}%`, top: `${100 * y}%`, width: `${width}px`, height: `${width}px` });
    }
    function paintDown(event) {
      event.preventDefault();
      area.setPointerCapture(event.pointerId);
      paint.from = null;
      stroke(at(event));
    }
    function paintMove(event) {
      ring(event);
      if (event.buttons & 1 && paint.from) stroke(at(event));
    }
    function paintUp() {
      if (!paint.from) return;
      paint.from = null;
      const mask = maskText();
      paint.mask = mask;
      commit((all) => { all[state.painting].mask = mask; });
    }

    /* The toolbar */
    const tool = (icon, label, act, keys = "") => {
      const button = el("button", "icon tool");
      button.type = "button";
      button.title = keys ? `${label} (${keys})` : label;
      button.setAttribute("aria-label", label);
      button.innerHTML = `<svg viewBox="0 0 20 20" aria-hidden="true"><path class="line" d="${ICONS[icon]}"/></svg>`;
      button.addEventListener("click", act);
      return button;
    };
    const word = (label, act, classes = "btn mini-btn") => {
      const button = el("button", classes, label);
      button.type = "button";
      button.addEventListener("click", act);
      return button;
    };
    const toggle = (icon, label, name) => {
      const button = tool(icon, label, () => { state[name] = !state[name]; draw(false); });
      button.dataset.name = name;
      return button;
    };
    const newBox = word("New box", () => {
      const by = 0.03 * (concepts().length % 8);
      add({ box: [0.0625, 0.0625, 0.4375, 0.4375].map((edge) => round(edge + by)) });
      focusBox();
    });
    newBox.title = "Or drag on the canvas; with Shift also over other boxes";
    const undoTool = tool("undo", "Undo", undo, "Ctrl+Z");
    const redoTool = tool("redo", "Redo", redo, "Ctrl+Shift+Z");
    const toggles = [toggle("snap", "Snap to the grid and to other boxes", "snap"),
      toggle("boxes", "Show the boxes", "showBoxes"), toggle("picture", "Show the picture", "showPicture")];
    const chooser = el("input");
    Object.assign(chooser, { type: "file", accept: ".yaml,.yml,.json,.png", multiple: true, hidden: true });
    chooser.addEventListener("change", async () => {
      const files = [];
      for (const file of [...chooser.files]) {
        try { files.push({ name: file.name, path: (await upload(file)).path }); }
        catch { files.push({ name: file.name, path: "" }); }
      }
      chooser.value = "";
      if (files.length) trigger("open", { files });
    });
    const gap = el("span", "gap");
    const edit = el("div", "bar-part");
    edit.append(newBox, undoTool, redoTool, ...toggles, gap, word("Open layout", () => chooser.click()),
      word("Save layout", () => trigger("save", {})), chooser);
    const paintBar = el("div", "bar-part painting");
    const painted = el("b");
    const sizeLabel = el("label", "brush-size");
    const size = el("input");
    Object.assign(size, { type: "range", min: 0.01, max: 0.5, step: 0.01, value: paint.size });
    size.setAttribute("aria-label", "Brush size");
    const fillSize = () => size.style.setProperty("--range_progress", `${100 * (size.value - 0.01) / 0.49}%`);
    size.addEventListener("input", () => { paint.size = Number(size.value); fillSize(); });
    fillSize();
    sizeLabel.append(el("span", "soft", "Brush"), size);
    const eraser = word("Erase", () => { paint.erase = !paint.erase; draw(false); }, "btn mini-btn toggle-btn");
    paintBar.append(painted, sizeLabel, eraser,
      word("Clear", () => { commit((all) => { all[state.painting].mask = ""; }); }),
      word("Done", () => { state.painting = -1; draw(); }, "btn mini-btn primary"));
    bar.append(edit, paintBar);

    /* Drawing what the value says */
    const nodes = [];
    function boxNode(index) {
      if (nodes[index]) return nodes[index];
      const node = el("div", "box");
      node.tabIndex = 0;
      node.dataset.index = index;
      node.setAttribute("role", "button");
      node.append(el("span", "box-label"));
      node.addEventListener("focus", () => { if (state.selected !== index && !drag) select(index); });
      nodes[index] = node;
      return node;
    }
    function lay(node, box) {
      Object.assign(node.style, { left: `${100 * box[0]}%`, top: `${100 * box[1]}%`,
        width: `${100 * (box[2] - box[0])}%`, height: `${100 * (box[3] - box[1])}%` });
    }
    function drawBoxes() {
      const all = concepts();
      const order = ranks();
      const shown = [];
      all.forEach((concept, index) => {
        const box = drag?.index === index && drag.next ? drag.next : concept.box;
        if (!box) return;
        const node = boxNode(index);
        lay(node, box);
        const chosen = state.selected === index;
        node.className = `box c${index}${chosen ? " chosen" : ""}${concept.mask ? " masked" : ""}`
          + `${concept.adapter ? "" : " bare"}${node.classList.contains("target") ? " target" : ""}`;
        node.style.zIndex = order.indexOf(index) + 1;
        if (chosen) lay(grips, box);
        const text = called(concept, index);
        const label = node.querySelector(".box-label");
        if (label.textContent !== text) label.textContent = text;
        const where = `from ${percent(box[0])} to ${percent(box[2])} across, ${percent(box[1])} to ${percent(box[3])} down`;
        node.setAttribute("aria-label", `${text}, box ${where}`);
        node.setAttribute("aria-pressed", String(chosen));
        shown.push(node);
      });
      for (const node of [...boxes.children]) if (!shown.includes(node) && !node.classList.contains("new")) node.remove();
      for (const node of shown) if (node.parentNode !== boxes) boxes.append(node);
      grips.hidden = !shown.includes(nodes[state.selected]);
      grips.className = `grips c${state.selected}`;
      let fresh = boxes.querySelector(".new");
      if (drag?.kind === "draw" && drag.next) {
        if (!fresh) { fresh = el("div", "box new"); boxes.append(fresh); }
        fresh.className = `box new c${all.length}`;
        lay(fresh, drag.next);
      } else fresh?.remove();
    }
    function drawMasks() {
      masks.replaceChildren(...concepts().flatMap((concept, index) => {
        if (!concept.mask || state.painting === index) return [];
        const node = el("i", `c${index}${state.selected === index ? " chosen" : ""}`);
        node.style.maskImage = node.style.webkitMaskImage = `url("${concept.mask}")`;
        return [node];
      }));
    }
    function drawAll() {
      const { frame, under } = state;
      area.style.setProperty("--ratio", String(frame.width / frame.height));
      area.classList.toggle("live", Boolean(under.live));
      const source = state.showPicture ? under.src : "";
      if (picture.getAttribute("src") !== source) {
        if (source) picture.src = source; else picture.removeAttribute("src");
      }
      area.classList.toggle("pictured", Boolean(source));
      area.classList.toggle("unboxed", !state.showBoxes && !drag);
      const painting = state.painting >= 0;
      area.classList.toggle("painting", painting);
      edit.hidden = painting;
      paintBar.hidden = !painting;
      if (painting) {
        openSheet();
        sheet.className = `paint c${state.painting}`;
        brush.className = `brush-ring c${state.painting}`;
        painted.textContent = `Mask of ${called(concepts()[state.painting], state.painting)}`;
        eraser.setAttribute("aria-pressed", String(paint.erase));
      } else paint.index = -1;
      hint.hidden = Boolean(concepts().length || source);
      newBox.disabled = concepts().length >= MOST;
      undoTool.disabled = !state.past.length;
      redoTool.disabled = !state.future.length;
      for (const button of toggles) button.setAttribute("aria-pressed", String(state[button.dataset.name]));
      drawMasks();
      drawBoxes();
    }
    state.drawers.push(drawAll);
    watch("value", () => {
      const now = JSON.stringify(props.value);
      if (now === state.known) return;
      if (state.known) state.past.push(state.known);   // what arrives can be undone as well
      state.known = now;
      state.painting = -1;
      state.selected = Math.min(state.selected, concepts().length - 1);
      draw();
    });
    draw();
  }

  /* Where something dragged would land: a concept's place in the list, or a free spot of the canvas. */
  function spotAt(event) {
    for (const node of document.querySelectorAll(".target")) node.classList.remove("target");
    const area = document.querySelector(".board-canvas");
    if (!event || !area?.offsetParent) return null;
    const card = document.elementsFromPoint(event.clientX, event.clientY)
      .map((node) => node.closest(".box[data-index], .concept[data-index]")).find(Boolean);
    const frame = area.getBoundingClientRect();
    const [x, y] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    if (card) {
      card.classList.add("target");
      return { index: Number(card.dataset.index), x, y };
    }
    if (x < 0 || y < 0 || x > 1 || y > 1) return null;
    area.classList.add("target");
    return { index: -1, x, y };
  }
  /* An entry of the library let go at a spot. */
  function dropAt(spot, entry) {
    if (spot.index >= 0) { assign(spot.index, entry); return; }
    const side = 0.375;
    const [left, up] = [spot.x, spot.y].map((middle) => Math.min(Math.max(middle - side / 2, 0), 1 - side));
    if (add({ box: [left, up, left + side, up + side].map(round) })) assign(concepts().length - 1, entry);
  }

  /* What Python says besides the board: the canvas' shape, the picture beneath. */
  function told(name, props, watch) {
    const take = () => { state[name] = props.value; draw(false); };
    watch("value", take);
    take();
  }

  /* What is brought back from below appears on the canvas: go there. */
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.('#compose-history [data-act="recall"]')) return;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    document.querySelector("#tabs").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  });

  /* A file to keep: its text, or where it lies. */
  function download(props, watch) {
    watch("value", () => {
      const { name, text, url } = props.value ?? {};
      if (!name) return;
      const link = el("a");
      link.download = name;
      link.href = url ?? URL.createObjectURL(new Blob([text], { type: "text/yaml" }));
      document.body.append(link);
      link.click();
      link.remove();
      if (!url) setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  const canvas = { state, concepts, called, commit, select, add, assign, duplicate, remove, raise, ranks, place, dropAt, MOST };
  Object.assign(window.intarsia, { board, told, download, spotAt, canvas });
})();

/* Beside the canvas: a card per concept, and the library's adapters to be dragged onto boxes. */
(() => {
  "use strict";
  const { el, shelf, slider, picker, changes, canvas, spotAt } = window.intarsia;
  const { state, concepts, called, commit } = canvas;
  const FAR = 5;      // pixels from which a press is a drag
  const WAIT = 160;   // milliseconds without a key before the library is searched
  const PLACES = { box: "Box", brush: "Brush", none: "None" };
  const ICONS = {
    duplicate: "M7 7h9v9H7ZM4 13V4h9", up: "M10 15V5M5.5 9.5 10 5l4.5 4.5", down: "M10 5v10M5.5 10.5 10 15l4.5-4.5",
    remove: "M4 5.5h12M8 5.5V3.8h4v1.7M5.5 5.5l.7 10.7h7.6l.7-10.7M8.4 8.6v4.6M11.6 8.6v4.6",
  };

  function cast(element) {
    const box = el("div", "cast-list");
    const head = el("div", "cast-head");
    const more = el("button", "btn mini-btn", "Add");
    more.type = "button";
    more.title = "A concept without a place; give it one on its card";
    more.addEventListener("click", () => canvas.add());
    head.append(el("h4", "", "Concepts"), more);
    const list = el("div", "concepts");
    const library = el("div", "cast-library");
    box.append(head, list, library);
    element.replaceChildren(box);
    let offer = () => {};
    shelf("rack").drawers.push(() => offer());

    const text = (index, field, label, hint, lines) => {
      const row = el("label", "field");
      const input = el(lines ? "textarea" : "input");
      if (lines) input.rows = lines; else input.type = "text";
      Object.assign(input, { value: concepts()[index][field], placeholder: hint });
      input.dataset.key = `${index} ${field}`;
      input.setAttribute("aria-label", `${label} of ${called(concepts()[index], index)}`);
      input.addEventListener("input", () => {
        commit((all) => { all[index][field] = input.value; }, { key: `${field} ${index}`, cards: false });
        if (field === "name") {
          for (const name of list.querySelectorAll(`[data-index="${index}"] .who`)) {
            name.textContent = called(concepts()[index], index);
          }
        }
      });
      row.append(el("span", "what", label), input);
      return row;
    };
    const icon = (index, name, label, act) => {
      const button = el("button", "icon small");
      button.type = "button";
      button.title = label;
      button.dataset.key = `${index} ${name}`;
      button.setAttribute("aria-label", `${label}: ${called(concepts()[index], index)}`);
      button.innerHTML = `<svg viewBox="0 0 20 20" aria-hidden="true"><path class="line" d="${ICONS[name]}"/></svg>`;
      button.addEventListener("click", (event) => { event.stopPropagation(); act(); });
      return button;
    };

    function places(index) {
      const concept = concepts()[index];
      const now = state.painting === index || concept.mask ? "brush" : concept.box ? "box" : "none";
      const row = el("div", "places");
      row.setAttribute("role", "group");
      row.setAttribute("aria-label", `Place of ${called(concept, index)}`);
      row.append(el("span", "what", "place"));
      for (const [kind, label] of Object.entries(PLACES)) {
        const button = el("button", "btn mini-btn toggle-btn", label);
        button.type = "button";
        button.dataset.key = `${index} place ${kind}`;
        button.setAttribute("aria-pressed", String(kind === now));
        button.addEventListener("click", () => canvas.place(index, kind));
        row.append(button);
      }
      return row;
    }

    function body(index) {
      const concept = concepts()[index];
      const name = called(concept, index);
      const inner = el("div", "concept-body");
      const search = picker({
        id: "concept", label: `Adapter of ${name}`, placeholder: concept.adapter || "Choose from the library…",
        none: "Nothing else", fits: (entry) => entry.adapter !== concept.adapter,
        pick: (entry) => canvas.assign(index, entry),
      });
      search.search.dataset.key = `${index} adapter`;
      search.search.classList.toggle("set", Boolean(concept.adapter));
      offer = search.offer;
      inner.append(search.node, slider({
        classes: "weight", label: "weight", key: `${index} weight`, value: concept.weight, low: -1, high: 2,
        bounds: [-7, 7], said: `Weight of ${name}`,
        set: (chosen) => commit((all) => { all[index].weight = chosen; }),
      }));
      inner.append(text(index, "prompt", "Prompt", concept.trigger || "what this place shows", 2), places(index));
      const details = el("details", "more");
      details.open = state.detailed ?? false;
      details.addEventListener("toggle", () => { state.detailed = details.open; });
      const summary = el("summary", "", "Name and words");
      summary.dataset.key = `${index} summary`;
      const changed = changes(concept);
      if (changed) summary.append(el("span", "changed", changed));
      details.append(summary, text(index, "name", "Name", concept.adapter || `Concept ${index + 1}`),
        text(index, "words", "Words", "its words in the prompt of the whole"));
      inner.append(details);
      return inner;
    }

    function card(index) {
      const concept = concepts()[index];
      const open = state.selected === index;
      const node = el("article", `concept c${index}${open ? " open" : ""}`);
      node.dataset.index = index;
      const bar = el("div", "concept-head");
      const pick = el("button", "concept-name");
      pick.type = "button";
      pick.dataset.key = `${index} name button`;
      pick.setAttribute("aria-expanded", String(open));
      const told = concept.adapter ? `${concept.adapter} ${concept.weight}` : "no adapter yet";
      const words = [concept.name ? told : concept.adapter ? concept.note : told];
      if (!concept.box && !concept.mask) words.push("no place");
      pick.append(el("i", "dot"), el("span", "who", called(concept, index)),
        el("span", concept.adapter ? "note" : "note lacking", words.filter(Boolean).join(", ")));
      pick.addEventListener("click", () => canvas.select(open ? -1 : index));
      bar.append(pick, icon(index, "up", "Bring forward", () => canvas.raise(index, 1)),
        icon(index, "down", "Send back", () => canvas.raise(index, -1)),
        icon(index, "duplicate", "Duplicate", () => canvas.duplicate(index)),
        icon(index, "remove", "Remove", () => canvas.remove(index)));
      node.append(bar);
      if (open) node.append(body(index));
      else if (concept.prompt) node.append(el("p", "said", concept.prompt));
      return node;
    }

    function draw(cards) {
      more.disabled = concepts().length >= canvas.MOST;
      if (!cards || !state.props) return;
      const held = list.contains(document.activeElement) ? document.activeElement : null;
      const key = held?.dataset.key;
      const caret = held && "selectionStart" in held && held.type !== "range" && held.type !== "number"
        ? held.selectionStart : null;
      offer = () => {};
      const front = [...canvas.ranks()].reverse();   // what lies on top comes first
      list.replaceChildren(...front.map(card));
      if (!front.length) list.append(el("p", "soft", "Every box you draw is listed here."));
      if (!key) return;
      const again = list.querySelector(`[data-key="${CSS.escape(key)}"]`);
      again?.focus({ preventScroll: true });
      if (caret !== null && again?.setSelectionRange) again.setSelectionRange(caret, caret);
    }
    state.drawers.push(draw);
    draw(true);
    stock(library);
  }

  /* The library: rows to be dragged, or pressed for the chosen concept. */
  function stock(box) {
    const own = shelf("cast");
    const search = el("input", "add");
    Object.assign(search, { type: "search", autocomplete: "off", placeholder: "Search the library…" });
    search.setAttribute("aria-label", "Search adapters to drag onto the canvas");
    let waiting = 0;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => own.ask(search.value), WAIT);
    });
    const rows = el("div", "stock");
    const head = el("div", "cast-head");
    head.append(el("h4", "", "Library"), el("span", "soft", "drag onto a box"));
    box.append(head, search, rows);

    function row(entry) {
      const node = el("button", "stock-row");
      node.type = "button";
      node.dataset.adapter = entry.adapter;
      node.title = "Drag onto a box, or press for the chosen concept";
      if (entry.face) {
        const face = el("img");
        Object.assign(face, { src: entry.face, alt: "", draggable: false });
        node.append(face);
      } else node.append(el("i", "letters", entry.adapter.slice(0, 2).toUpperCase()));
      node.append(el("span", "who", entry.adapter), el("span", "note", entry.note));
      node.addEventListener("pointerdown", (event) => press(event, node, entry));
      node.addEventListener("click", (event) => { if (event.detail === 0) take(entry); });   // Enter or space
      return node;
    }
    const take = (entry) => {
      if (state.selected >= 0) canvas.assign(state.selected, entry);
      else canvas.dropAt({ index: -1, x: 0.5, y: 0.5 }, entry);
    };
    function press(event, node, entry) {
      if (event.button !== 0) return;
      const from = [event.clientX, event.clientY];
      let ghost = null;
      const move = (now) => {
        if (!ghost && Math.hypot(now.clientX - from[0], now.clientY - from[1]) < FAR) return;
        if (!ghost) {
          ghost = el("div", "ghost", entry.adapter);
          document.body.append(ghost);
          document.body.classList.add("dragging");
        }
        now.preventDefault();
        Object.assign(ghost.style, { left: `${now.clientX}px`, top: `${now.clientY}px` });
        ghost.classList.toggle("lands", Boolean(spotAt(now)));
      };
      const end = (now) => {
        removeEventListener("pointermove", move);
        removeEventListener("pointerup", end);
        removeEventListener("pointercancel", end);
        document.body.classList.remove("dragging");
        const spot = ghost && now.type === "pointerup" ? spotAt(now) : null;
        spotAt(null);
        if (ghost) ghost.remove();
        else if (now.type === "pointerup") take(entry);
        if (spot) canvas.dropAt(spot, entry);
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", end);
      addEventListener("pointercancel", end);
    }
    let known = "";
    function draw() {
      const now = JSON.stringify(own.rows);
      if (now === known) return;
      known = now;
      rows.replaceChildren(...own.rows.map(row));
      if (!own.rows.length) {
        const said = search.value ? "Nothing found" : "The library is empty: drop a .safetensors file anywhere.";
        rows.append(el("p", "soft", said));
      }
    }
    own.drawers.push(draw);
    draw();
  }

  Object.assign(window.intarsia, { cast });
})();

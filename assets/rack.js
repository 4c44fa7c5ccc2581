/* The adapters in use: a weight for each, and behind a row's summary its parts of the model and its steps. */
(() => {
  "use strict";
  const { el, copy } = window.intarsia;
  const percent = (share) => `${Math.round(share * 100)} %`;

  /* The factor the engine takes for a path: that of the longest start that fits. */
  const factorOf = (blocks, path) => {
    const fitting = Object.keys(blocks).filter((start) => path === start || path.startsWith(`${start}.`));
    return fitting.length ? blocks[fitting.sort((a, b) => b.length - a.length)[0]] : 1;
  };

  const changes = (use) => {
    const words = [];
    const parts = Object.keys(use.blocks).length;
    if (parts) words.push(parts === 1 ? "1 part" : `${parts} parts`);
    if (use.first !== 0 || use.last !== 1) words.push(`${percent(use.first)} to ${percent(use.last)}`);
    return words.join(", ");
  };

  /* What the library offers, by who asks for it: renewed by the page's clock and by typing, apart from what is in use. */
  const shelves = {};
  const shelf = (name) => (shelves[name] ??= { text: "", rows: [], ask: () => {}, drawers: [] });
  function offers(name, props, trigger, watch) {
    const own = shelf(name);
    const take = () => { Object.assign(own, props.value); for (const draw of own.drawers) draw(); };
    own.ask = (text) => trigger("find", { text });
    watch("value", take);
    take();
  }

  /* A slider with an exact field behind it; `key` finds it again after the rack was drawn anew. */
  const slider = ({ classes, label, title, key, value, low, high, bounds, said, set }) => {
    const row = el("label", classes);
    const what = el("span", "what", label);
    if (title) what.title = title;
    const range = el("input");
    Object.assign(range, { type: "range", min: low, max: high, step: 0.05, value: value ?? 1 });
    range.setAttribute("aria-label", said);
    range.dataset.key = `${key} range`;
    const number = el("input", "exact");
    Object.assign(number, { type: "number", min: bounds[0], max: bounds[1], step: 0.05, value: value ?? "" });
    if (value === undefined) number.placeholder = "mixed";
    number.setAttribute("aria-label", `Exact ${said[0].toLowerCase()}${said.slice(1)}`);
    number.dataset.key = `${key} exact`;
    const take = (text) => {
      const chosen = Number(text);
      const within = chosen >= bounds[0] && chosen <= bounds[1];
      if (text === "" || !Number.isFinite(chosen) || !within) { number.value = value ?? ""; return; }
      set(chosen);
    };
    const fill = () => {
      range.style.setProperty("--range_progress", `${100 * (Number(range.value) - low) / (high - low)}%`);
    };
    range.addEventListener("input", () => { number.value = range.value; fill(); });
    fill();
    range.addEventListener("change", () => take(range.value));
    number.addEventListener("change", () => take(number.value));
    row.append(what, range, number);
    return row;
  };

  /* A field that looks for adapters in the library, with what it found beneath it. */
  function picker({ id, label, placeholder, none, fits, pick }) {
    const own = shelf("rack");
    const node = el("div", "adder");
    const search = el("input", "add");
    const popup = el("div", "offers");
    let chosen = -1;
    let waiting = 0;
    Object.assign(search, { type: "search", autocomplete: "off", placeholder });
    for (const [name, value] of Object.entries({ role: "combobox", "aria-label": label,
      "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": `${id}-offers` })) {
      search.setAttribute(name, value);
    }
    Object.assign(popup, { id: `${id}-offers`, hidden: true });
    popup.setAttribute("role", "listbox");
    popup.setAttribute("aria-label", "Adapters of the library");
    node.append(search, popup);

    const rest = () => own.rows.filter(fits);
    const take = (entry) => {
      search.value = "";
      open(false);
      pick(entry);
      if (own.text) own.ask("");
    };
    const open = (on) => {
      popup.hidden = !on;
      search.setAttribute("aria-expanded", String(on));
      if (!on) chosen = -1;
      offer();
    };
    const offer = () => {
      if (popup.hidden) { search.removeAttribute("aria-activedescendant"); return; }
      const found = rest();
      chosen = Math.min(chosen, found.length - 1);
      const rows = found.map((entry, index) => {
        const row = el("div", index === chosen ? "offer chosen" : "offer");
        row.id = `${id}-offer-${index}`;
        row.setAttribute("role", "option");
        row.setAttribute("aria-selected", String(index === chosen));
        row.append(el("span", "", entry.adapter), el("span", "note", entry.note));
        row.addEventListener("pointerdown", (event) => { event.preventDefault(); take(entry); });
        return row;
      });
      if (!rows.length) {
        const empty = !search.value && !own.text;
        const said = !empty ? "Nothing found" : own.rows.length ? none
          : "The library is empty: drop a .safetensors file anywhere";
        rows.push(el("div", "offer none", said));
      }
      popup.replaceChildren(...rows);
      if (chosen >= 0) search.setAttribute("aria-activedescendant", `${id}-offer-${chosen}`);
      else search.removeAttribute("aria-activedescendant");
    };
    search.addEventListener("focus", () => {
      if (own.text !== search.value) own.ask(search.value);   // another field asked for something else
      open(true);
    });
    search.addEventListener("blur", () => open(false));
    search.addEventListener("input", () => {
      open(true);
      clearTimeout(waiting);
      waiting = setTimeout(() => own.ask(search.value), 160);
    });
    search.addEventListener("keydown", (event) => {
      const found = rest();
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        const step = event.key === "ArrowDown" ? 1 : -1;
        chosen = found.length ? (chosen + step + found.length + (chosen < 0 && step < 0 ? 1 : 0)) % found.length : -1;
        open(true);
      } else if (event.key === "Enter" && !popup.hidden && (chosen >= 0 || found.length === 1)) {
        event.preventDefault();
        take(found[Math.max(chosen, 0)]);
      } else if (event.key === "Escape") {
        search.value = "";
        open(false);
        if (own.text) own.ask("");
      }
    });
    return { node, search, offer };
  }

  function rack(element, props, trigger, watch) {
    const opened = new Set();   // adapters whose row a person has opened
    const commit = (change) => {
      const value = copy(props.value);
      change(value.uses, value);
      props.value = value;
      draw();
      trigger("change", {});
    };

    const weight = (use, index) => slider({
      classes: "weight", label: use.role === "concept" ? "weight" : use.role, key: `${use.adapter} weight`,
      value: use.weight, low: -1, high: 2, bounds: [-7, 7], said: `Weight of ${use.adapter}`,
      set: (chosen) => commit((uses) => { uses[index].weight = chosen; }),
    });

    const part = (use, index, group) => {
      const factors = new Set(group.starts.map((start) => factorOf(use.blocks, start)));
      const layers = group.layers === 1 ? "1 layer" : `${group.layers} layers`;
      return slider({
        classes: group.inside ? "weight part inner" : "weight part", label: group.title,
        title: `${layers}: ${group.starts.join(", ")}`, key: `${use.adapter} part ${group.title}`,
        value: factors.size === 1 ? [...factors][0] : undefined, low: 0, high: 2, bounds: [-7, 7],
        said: `Factor of ${use.adapter} in ${group.title}`,
        set: (chosen) => commit((uses) => { for (const start of group.starts) uses[index].blocks[start] = chosen; }),
      });
    };

    /* From where to where of the denoising: two handles on one line. */
    const steps = (use, index) => {
      const box = el("div", "span");
      const told = el("output", "num");
      const line = el("div", "two");
      const handle = (name, label) => {
        const input = el("input");
        Object.assign(input, { type: "range", min: 0, max: 1, step: 0.01, value: use[name] });
        input.setAttribute("aria-label", `${use.adapter} acts ${label}`);
        input.dataset.key = `${use.adapter} ${name}`;
        return input;
      };
      const [from, until] = [handle("first", "from"), handle("last", "until")];
      const show = () => {
        told.textContent = `from ${percent(from.value)} until ${percent(until.value)}`;
        line.style.setProperty("--from", `${100 * from.value}%`);
        line.style.setProperty("--until", `${100 * until.value}%`);
        line.classList.toggle("right", Number(from.value) > 0.5);   // of two handles on one spot, the one that can move
        from.setAttribute("aria-valuetext", percent(from.value));
        until.setAttribute("aria-valuetext", percent(until.value));
      };
      from.addEventListener("input", () => {
        from.value = Math.min(from.value, Number(until.value) - 0.01);
        show();
      });
      until.addEventListener("input", () => {
        until.value = Math.max(until.value, Number(from.value) + 0.01);
        show();
      });
      const done = () => commit((uses) => {
        Object.assign(uses[index], { first: Number(from.value), last: Number(until.value) });
      });
      from.addEventListener("change", done);
      until.addEventListener("change", done);
      show();
      const head = el("div", "span-head");
      head.append(el("span", "what", "acts"), told);
      line.append(from, until);
      box.append(head, line);
      return box;
    };

    const details = (use, index) => {
      const box = el("details", "more");
      box.open = opened.has(use.adapter);
      const summary = el("summary", "", use.role === "concept" ? "Parts and steps" : `Steps of the ${use.role}`);
      summary.dataset.key = `${use.adapter} summary`;
      const changed = changes(use);
      if (changed) summary.append(el("span", "changed", changed));
      box.append(summary);
      box.addEventListener("toggle", () => {
        if (box.open === opened.has(use.adapter)) return;
        opened[box.open ? "add" : "delete"](use.adapter);
        if (box.open && !use.groups) trigger("groups", { adapter: use.adapter });
      });
      const groups = use.groups ?? [];
      if (groups.length > 1) for (const group of groups) box.append(part(use, index, group));
      const known = new Set(groups.flatMap((group) => group.starts));
      const others = Object.entries(use.blocks).filter(([start]) => !known.has(start));
      if (use.groups && others.length) {
        box.append(el("p", "also", `Also: ${others.map(([start, factor]) => `${start} ${factor}`).join(", ")}`));
      }
      box.append(steps(use, index));
      const reset = el("button", "btn reset", "Reset");
      reset.type = "button";
      reset.disabled = !changed;
      reset.dataset.key = `${use.adapter} reset`;
      reset.setAttribute("aria-label", `Reset parts and steps of ${use.adapter}`);
      reset.addEventListener("click", () => commit((uses) => {
        Object.assign(uses[index], { blocks: {}, first: 0, last: 1 });
      }));
      box.append(reset);
      return box;
    };

    const card = (members) => {
      const box = el("div", "use");
      const head = el("div", "use-head");
      const first = members[0].use;
      const pair = members.length > 1 || first.role === "content" || first.role === "style";
      head.append(el("b", "", pair && first.group_name ? first.group_name : first.adapter));
      if (first.note) head.append(el("span", "note", first.note));
      const remove = el("button", "icon", "×");
      remove.type = "button";
      remove.title = "Remove";
      remove.setAttribute("aria-label", `Remove ${first.adapter}`);
      const gone = new Set(members.map((member) => member.index));
      remove.addEventListener("click", () => commit((uses, value) => {
        const names = new Set(members.map((member) => member.use.adapter));
        const left = uses.filter((_, index) => gone.has(index));
        value.kept = [...value.kept.filter((use) => !names.has(use.adapter)), ...left];
        value.uses = uses.filter((_, index) => !gone.has(index));
      }));
      head.append(remove);
      box.append(head);
      for (const { use, index } of members) box.append(weight(use, index));
      for (const { use, index } of members) box.append(details(use, index));
      for (const word of new Set(members.map((member) => member.use.trigger).filter(Boolean))) {
        const chip = el("button", "chip trigger", `+ ${word}`);
        chip.type = "button";
        chip.title = "Put the trigger words into the prompt";
        chip.addEventListener("click", () => trigger("word", { word }));
        box.append(chip);
      }
      return box;
    };

    const list = el("div", "uses");
    const adder = picker({
      id: element.closest("[id]")?.id ?? "rack", label: "Add an adapter", placeholder: "Add from the library…", none: "All in use",
      fits: (entry) => !props.value.uses.some((use) => use.adapter === entry.adapter),
      pick: (entry) => commit((uses, value) => {
        uses.push(value.kept.find((use) => use.adapter === entry.adapter) ?? entry);
      }),
    });
    element.querySelector(".rack").replaceChildren(list, adder.node);

    function draw() {
      const held = list.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
      const groups = new Map();
      props.value.uses.forEach((use, index) => {
        const key = use.group ? `group ${use.group}` : `row ${index}`;
        groups.set(key, [...(groups.get(key) ?? []), { use, index }]);
      });
      list.replaceChildren(...[...groups.values()].map(card));
      adder.offer();
      if (held) element.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
    }
    shelf("rack").drawers.push(adder.offer);
    watch("value", draw);
    draw();
  }

  Object.assign(window.intarsia, { rack, offers, shelf, slider, picker, changes });
})();

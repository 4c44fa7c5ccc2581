/* What the page's own components do in the browser. They show values and report what a person did; nothing else. */
(() => {
  "use strict";
  const el = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text; // never innerHTML: names come from strangers' files
    return node;
  };

  /* Light, dark: as the system says until a person chooses. */
  const stored = () => { try { return localStorage.getItem("intarsia-theme"); } catch { return null; } };
  const paint = () => {
    const dark = stored() ? stored() === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.body.classList.toggle("dark", dark);
  };
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.("[data-theme-switch]")) return;
    const next = document.body.classList.contains("dark") ? "light" : "dark";
    try { localStorage.setItem("intarsia-theme", next); } catch { /* private window: holds until reload */ }
    document.body.classList.toggle("dark", next === "dark");
  });
  const keepPainted = () => {
    paint();
    new MutationObserver(() => {   // gradio sets its own idea of dark once, after it has loaded
      const dark = stored() ? stored() === "dark" : null;
      if (dark !== null && document.body.classList.contains("dark") !== dark) paint();
    }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  if (document.body) keepPainted();   // gradio may add this script after the page was parsed
  else document.addEventListener("DOMContentLoaded", keepPainted);

  /* What a setting means is its label's tooltip. */
  document.addEventListener("pointerover", (event) => {
    const label = event.target.closest?.('[data-testid="block-info"]');
    const info = label?.nextElementSibling;
    if (info?.classList.contains("info-text")) label.title = info.textContent;
  });

  /* Ctrl+Enter makes pictures from wherever one types. */
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const go = document.getElementById("generate");
    if (go && go.offsetParent !== null) { event.preventDefault(); go.click(); }
  });

  /* Buttons in cards: one click event with the button's data. `data-confirm` asks once more, in place. */
  function actions(element, trigger) {
    element.addEventListener("click", (event) => {
      const button = event.target.closest("[data-act]");
      if (!button || !element.contains(button) || button.disabled) return;
      if (button.dataset.confirm && !button.classList.contains("armed")) {
        const label = button.textContent;
        button.classList.add("armed");
        button.textContent = button.dataset.confirm;
        setTimeout(() => { button.classList.remove("armed"); button.textContent = label; }, 4000);
        return;
      }
      if (button.dataset.tab) openTab(button.dataset.tab);
      trigger("act", { ...button.dataset });
    });
  }

  function openTab(name) {
    for (const tab of document.querySelectorAll('[role="tab"]')) if (tab.textContent.trim() === name) tab.click();
  }

  const copy = (value) => JSON.parse(JSON.stringify(value));

  /* Adapters in use: one row each, the halves of a pair together, a slider per weight. */
  function rack(element, props, trigger, watch) {
    const commit = (change) => {
      const value = copy(props.value);
      change(value.uses);
      props.value = value;
      draw();
      trigger("change", {});
    };
    const slider = (use, index, label) => {
      const row = el("label", "weight");
      row.append(el("span", "what", label));
      const range = el("input");
      Object.assign(range, { type: "range", min: -1, max: 2, step: 0.05, value: use.weight });
      range.setAttribute("aria-label", `Weight of ${use.adapter}`);
      const number = el("input", "exact");
      Object.assign(number, { type: "number", min: -7, max: 7, step: 0.05, value: use.weight });
      number.setAttribute("aria-label", `Exact weight of ${use.adapter}`);
      const set = (text) => {
        const weight = Number(text);
        if (text === "" || !Number.isFinite(weight)) { number.value = use.weight; return; }
        commit((uses) => { uses[index].weight = weight; });
      };
      const fill = () => range.style.setProperty("--range_progress", `${100 * (Number(range.value) + 1) / 3}%`);
      range.addEventListener("input", () => { number.value = range.value; fill(); });
      fill();
      range.addEventListener("change", () => set(range.value));
      number.addEventListener("change", () => set(number.value));
      row.append(range, number);
      return row;
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
      remove.addEventListener("click", () => commit((uses) => {
        const kept = uses.filter((_, index) => !gone.has(index));
        uses.splice(0, uses.length, ...kept);
      }));
      head.append(remove);
      box.append(head);
      for (const { use, index } of members) box.append(slider(use, index, use.role === "concept" ? "weight" : use.role));
      for (const word of new Set(members.map((member) => member.use.trigger).filter(Boolean))) {
        const chip = el("button", "chip trigger", `+ ${word}`);
        chip.type = "button";
        chip.title = "Put the trigger words into the prompt";
        chip.addEventListener("click", () => trigger("word", { word }));
        box.append(chip);
      }
      return box;
    };
    function draw() {
      const { uses, shelf } = props.value;
      const groups = new Map();
      uses.forEach((use, index) => {
        const key = use.group ? `group ${use.group}` : `row ${index}`;
        groups.set(key, [...(groups.get(key) ?? []), { use, index }]);
      });
      const list = el("div", "uses");
      for (const members of groups.values()) list.append(card(members));
      const used = new Set(uses.map((use) => use.adapter));
      const rest = shelf.filter((entry) => !used.has(entry.adapter));
      const add = el("select", "add");
      add.setAttribute("aria-label", "Add an adapter");
      const hint = el("option", "", shelf.length ? (rest.length ? "Add from the library…" : "All in use")
        : "Drop a .safetensors file anywhere");
      hint.value = "";
      add.append(hint);
      for (const entry of rest) {
        const option = el("option", "", entry.family ? `${entry.adapter} · ${entry.family}` : entry.adapter);
        option.value = entry.adapter;
        add.append(option);
      }
      add.disabled = !rest.length;
      add.addEventListener("change", () => {
        const entry = rest.find((candidate) => candidate.adapter === add.value);
        if (entry) commit((all) => { all.push({ ...entry, weight: 1 }); });
      });
      element.querySelector(".rack").replaceChildren(list, add);
    }
    watch("value", draw);
    draw();
  }

  /* Pictures to learn from: a thumbnail, its caption, a cross. */
  function sheet(element, props, trigger, watch) {
    const commit = (change, redraw) => {
      const value = copy(props.value);
      change(value);
      props.value = value;
      if (redraw) draw();
      trigger("change", {});
    };
    function draw() {
      const list = el("div", "sheet-rows");
      props.value.forEach((picture, index) => {
        const row = el("div", "sheet-row");
        const thumb = el("img");
        thumb.src = picture.thumb;
        thumb.alt = picture.name;
        const caption = el("textarea");
        caption.rows = 2;
        caption.value = picture.caption;
        caption.placeholder = "Caption: what is to be seen";
        caption.setAttribute("aria-label", `Caption of ${picture.name}`);
        caption.addEventListener("input", () => commit((all) => { all[index].caption = caption.value; }, false));
        const remove = el("button", "icon", "×");
        remove.type = "button";
        remove.setAttribute("aria-label", `Remove ${picture.name}`);
        remove.addEventListener("click", () => commit((all) => { all.splice(index, 1); }, true));
        row.append(thumb, caption, remove);
        list.append(row);
      });
      element.querySelector(".sheet").replaceChildren(list);
    }
    watch("value", draw);
    draw();
  }

  /* Files dropped anywhere on the page, whatever they are: Python says what becomes of them. */
  function dropzone(element, trigger, upload) {
    const veil = el("div", "veil");
    veil.append(el("div", "veil-text", "Drop it: a picture or an adapter"));
    document.body.append(veil);
    const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let depth = 0;
    const show = (on) => { depth = on ? depth : 0; veil.classList.toggle("on", on); };
    addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; show(true); } });
    addEventListener("dragleave", (event) => { if (carries(event) && (depth -= 1) <= 0) show(false); });
    addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); }, true);
    addEventListener("drop", async (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      event.stopPropagation();
      show(false);
      const files = [];
      for (const file of [...event.dataTransfer.files]) {
        document.body.classList.add("uploading");
        try {
          const { path } = await upload(file);
          files.push({ name: file.name, path });
        } catch (error) {
          files.push({ name: file.name, path: "", reason: String(error?.message ?? error) });
        }
      }
      document.body.classList.remove("uploading");
      const tab = document.querySelector('[role="tab"][aria-selected="true"]')?.textContent.trim() ?? "";
      if (files.length) trigger("drop", { files, tab });
    }, true);
  }

  window.intarsia = { actions, rack, sheet, dropzone, openTab };
})();

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
    const go = ["generate", "compose-go"].map((id) => document.getElementById(id)).find((one) => one?.offsetParent);
    if (go) { event.preventDefault(); go.click(); }
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
      const form = button.closest("form");
      trigger("act", { ...form?.dataset, ...button.dataset, ...(form && { form: Object.fromEntries(new FormData(form)) }) });
    });
  }

  /* Long words, such as hashes, go to the clipboard by their own button. */
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch { button.textContent = "Not allowed"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  function openTab(name) {
    for (const tab of document.querySelectorAll('[role="tab"]')) if (tab.textContent.trim() === name) tab.click();
  }

  const copy = (value) => JSON.parse(JSON.stringify(value));

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
    veil.append(el("div", "veil-text", "Drop it: a picture, an adapter or a layout"));
    document.body.append(veil);
    const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let depth = 0;
    const show = (on) => { depth = on ? depth : 0; veil.classList.toggle("on", on); };
    addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; show(true); } });
    addEventListener("dragleave", (event) => { if (carries(event) && (depth -= 1) <= 0) show(false); });
    addEventListener("dragover", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      veil.classList.toggle("aside", Boolean(window.intarsia.spotAt(event)));   // the canvas shows where it would go
    }, true);
    addEventListener("drop", async (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      event.stopPropagation();
      show(false);
      const spot = window.intarsia.spotAt(event);
      window.intarsia.spotAt(null);
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
      if (files.length) trigger("drop", { files, tab, spot });
    }, true);
  }

  window.intarsia = { el, copy, actions, sheet, dropzone, openTab };
})();

// The keys, in one table: what the browser calls them, and what the help says.

const KEYS = [ // as the help shows them, what they do, whose work it is, the browser's names
  ["←  ↑  →  ↓", "move the image under the cross; with Shift in small steps", "move", "arrowleft", "arrowright", "arrowup", "arrowdown"],
  ["P,  Shift + P", "mark the object, or the background, at the cross", "point", "p"],
  ["B", "a corner of a box at the cross; again for the other corner", "corner", "b"],
  ["Enter,  N", "finish this object; the next click starts another", "finish", "enter", "n"],
  ["Ctrl + Z", "undo", "undo", "ctrl+z"],
  ["Ctrl + Y,  Ctrl + Shift + Z", "redo", "redo", "ctrl+y", "ctrl+shift+z"],
  ["A", "segment everything", "everything", "a"],
  ["[  ]", "select the object before, or after", "previous", "["],
  [null, null, "next", "]"],
  ["R", "rename the selected object", "rename", "r", "f2"],
  ["Delete", "delete the selected object", "delete", "delete", "backspace"],
  ["H", "hide the selected object, or show it", "hide", "h"],
  ["M", "hide all masks, or show them", "masks", "m"],
  ["+  −", "zoom", "in", "+", "="],
  [null, null, "out", "-"],
  ["0,  1", "fit the image, 100 %", "fit", "0"],
  [null, null, "actual", "1"],
  ["O", "open another image", "open", "o"],
  ["Escape", "cancel", "cancel", "escape"],
  ["?", "this help", "help", "?"],
];

/** `act`: by name, called with the event. `hold(whether)`: the space bar. `help`: a `dl` for the table. */
export function listenToKeys(act, hold, help) {
  const names = new Map(KEYS.flatMap(([, , name, ...keys]) => keys.map((key) => [key, name])));

  addEventListener("keydown", (event) => {
    const { target, key } = event, control = event.ctrlKey || event.metaKey;
    if (event.altKey || !free(target, key)) return;
    const name = names.get((control ? "ctrl+" : "") + (control && event.shiftKey ? "shift+" : "") + key.toLowerCase());
    if (key === " ") hold(true);
    if (!name && key !== " ") return;
    event.preventDefault();
    if (name) act[name](event);
  });
  addEventListener("keyup", ({ key }) => key === " " && hold(false));
  addEventListener("blur", () => hold(false));

  for (const [keys, text] of KEYS.filter(([keys]) => keys)) {
    const row = document.createElement("div");
    for (const [name, textContent] of [["dt", keys], ["dd", text]]) {
      row.append(Object.assign(document.createElement(name), { textContent }));
    }
    help.append(row);
  }
}

/** Whether the key is not the element's own: text that is typed, a button pressed, a choice moved. */
function free(target, key) {
  if (document.querySelector("dialog[open]") || target.matches("input:not([type=radio]), select")) return false;
  if (target.matches("button, a, summary")) return !["Enter", " "].includes(key);
  return !(target.matches("[type=radio]") && key.startsWith("Arrow"));
}

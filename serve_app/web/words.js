// What the page says and asks.

const $ = (id) => document.getElementById(id);
let retry = null;

export function say(text) { $("status").textContent = text; }
export function busy(is) { $("busy").hidden = !is; }

/** What went wrong, and what `again` does; null takes it away. */
export function problem(error, then = null) {
  retry = then;
  $("error").hidden = !error;
  $("error").querySelector("p").textContent = error?.message ?? "";
  $("error").querySelector("[data-do=again]").hidden = !then || error.final;
}

export function again() {
  const then = retry;
  problem(null);
  then?.();
}

/** → what was typed, where a `secret` is asked for; "yes"; or null. */
export function question(title, text, yes, secret = false) {
  const dialog = $("ask"), input = dialog.querySelector("input");
  $("ask-title").textContent = title;
  dialog.querySelector("p").textContent = text;
  dialog.querySelector(".main").textContent = yes;
  Object.assign(input, { hidden: !secret, value: "" });
  dialog.returnValue = "";
  dialog.showModal();
  (secret ? input : dialog.querySelector("[value='']")).focus();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve((dialog.returnValue && (secret ? input.value : "yes")) || null);
  });
}

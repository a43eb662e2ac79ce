// Mouse, pen and fingers on the canvas: clicks, boxes, panning and zoom.

const STILL = 4; // CSS pixels that a click may move
const WHEEL = 0.0016; // of zoom a pixel of the wheel

/** `act`: {point(at, on), box([x0, y0, x1, y1]), select(at), over(at or null)}, in image pixels. `tool()`: its name. */
export function listen(view, tool, act) {
  const { canvas } = view, down = new Map(); // pointer → where it is
  let gesture = null, space = false;

  const place = (event) => [event.offsetX, event.offsetY];
  const hand = () => canvas.classList.toggle("hand", space || tool() === "pan" || gesture?.kind === "pan");
  const stop = () => {
    gesture = view.box = view.corner = null;
    hand();
    view.draw();
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (!view.picture || event.button > 1) return;
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, place(event));
    const pan = event.button === 1 || space || tool() === "pan";
    gesture = { kind: down.size > 1 ? "pinch" : pan ? "pan" : "point", from: place(event) };
    view.cross = false;
    view.box = view.corner = null;
    hand();
  });

  canvas.addEventListener("pointermove", (event) => {
    const now = place(event), before = down.get(event.pointerId);
    act.over(view.toImage(...now));
    if (!before || !gesture) return;
    down.set(event.pointerId, now);
    if (gesture.kind === "pinch") return pinch(event.pointerId, before, now);
    if (gesture.kind === "pan") return view.pan(now[0] - before[0], now[1] - before[1]);
    if (gesture.kind === "point" && Math.hypot(now[0] - gesture.from[0], now[1] - gesture.from[1]) < STILL) return;
    gesture.kind = "box";
    view.box = view.boxed(view.toImage(...gesture.from), view.toImage(...now));
    view.draw();
  });

  canvas.addEventListener("pointerup", (event) => {
    const { kind } = gesture ?? {}, box = view.box;
    down.delete(event.pointerId);
    if (kind === "pinch" && down.size) return;
    stop();
    const at = view.toImage(...place(event));
    if (kind === "box" && box[2] - box[0] >= 1 && box[3] - box[1] >= 1) act.box(box);
    if (kind !== "point" || !view.inside(at)) return;
    if (event.ctrlKey || event.metaKey) act.select(at);
    else act.point(at, event.shiftKey !== (tool() === "background") ? 0 : 1);
  });

  canvas.addEventListener("pointercancel", (event) => (down.delete(event.pointerId), stop()));
  canvas.addEventListener("pointerleave", () => act.over(null));
  canvas.addEventListener("contextmenu", (event) => event.ctrlKey && event.preventDefault());
  canvas.addEventListener("auxclick", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode ? 16 : 1);
    if (view.picture) view.zoom(Math.exp(-pixels * WHEEL * (event.ctrlKey ? 5 : 1)), ...place(event));
  }, { passive: false });

  function pinch(id, before, now) {
    const other = [...down].find(([key]) => key !== id)?.[1];
    if (!other) return;
    const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
    view.zoom(apart(now) / apart(before), ...other);
  }

  return {
    /** While the space bar is held. */
    hold(held) { space = held, hand(); },
    cancel: stop,
    hand,
  };
}

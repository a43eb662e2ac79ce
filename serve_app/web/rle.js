// COCO's compressed run lengths: down the columns, off and on in turn, each run less the one two before it,
// in groups of five bits with the lowest first.

/** "counts" → lengths of the runs, the first one off. */
export function runs(counts) {
  const found = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0, shift = 0, code;
    do {
      code = counts.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value |= -1 << shift;
    if (found.length > 2) value += found.at(-2);
    found.push(value);
  }
  return found;
}

/** A mask of the service → {x, y, width, height, plane}: its box, and in it row by row 1 on, 0 off. */
export function decode({ segmentation, bbox }) {
  const [x, y, width, height] = bbox, rows = segmentation.size[0];
  const plane = new Uint8Array(width * height);
  let start = 0;
  runs(segmentation.counts).forEach((length, index) => {
    const end = start + length;
    if (index % 2) for (let at = start; at < end; at++) plane[((at % rows) - y) * width + Math.floor(at / rows) - x] = 1;
    start = end;
  });
  return { x, y, width, height, plane };
}

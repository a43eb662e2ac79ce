// What is taken home: COCO JSON, a label map, the picture with its objects.

import { maskOf } from "./objects.js";
import { decode } from "./rle.js";

/** COCO, one category a label; an annotation's id is the object's number, and its value in the label map. */
export function coco(picture, list, model) {
  const withMask = list.filter(maskOf), labels = [...new Set(withMask.map((one) => one.label))];
  const { name: file_name, width, height, id: image_id } = picture;
  const annotations = withMask.map((one) => {
    const { segmentation, bbox, area, predicted_iou, stability_score } = maskOf(one);
    const category_id = labels.indexOf(one.label) + 1, id = one.number;
    return { id, image_id: 1, category_id, segmentation, bbox, area, iscrowd: 0, predicted_iou, stability_score };
  });
  const made = {
    info: { description: "made with Cellray", model },
    images: [{ id: 1, file_name, width, height, image_id }],
    categories: labels.map((name, index) => ({ id: index + 1, name })),
    annotations,
  };
  return new Blob([JSON.stringify(made, null, 1)], { type: "application/json" });
}

/** A 16-bit grey PNG in which a pixel is its object's number, 0 outside. Where objects overlap, the smaller one shows. */
export async function labelMap({ width, height }, list) {
  const row = 1 + 2 * width, bytes = new Uint8Array(row * height), values = new DataView(bytes.buffer);
  const large = list.filter(maskOf).sort((a, b) => maskOf(b).area - maskOf(a).area);
  for (const one of large) {
    const { x, y, width: columns, plane } = decode(maskOf(one));
    plane.forEach((on, at) => {
      if (on) values.setUint16((y + Math.floor(at / columns)) * row + 1 + 2 * (x + (at % columns)), one.number);
    });
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 16); // bits, of one grey channel
  const packed = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  const data = new Uint8Array(await new Response(packed).arrayBuffer());
  const signature = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
  const parts = [chunk("IHDR", new Uint8Array(header.buffer)), chunk("IDAT", data), chunk("IEND", new Uint8Array())];
  return new Blob([signature, ...parts], { type: "image/png" });
}

export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** A PNG chunk: length, name, data, CRC-32 of name and data. */
function chunk(name, data) {
  const made = new Uint8Array(12 + data.length), view = new DataView(made.buffer);
  view.setUint32(0, data.length);
  made.set(new TextEncoder().encode(name), 4);
  made.set(data, 8);
  let sum = -1;
  for (const byte of made.subarray(4, 8 + data.length)) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (0xedb88320 & -(sum & 1));
  }
  view.setUint32(8 + data.length, ~sum);
  return made;
}

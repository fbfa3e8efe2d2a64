// Arrays of unsigned integers out of a .npy file (format versions 1 to 3), which numpy.lib.format describes.

const KINDS = { "|u1": [Uint8Array, 1], "<u2": [Uint16Array, 2], "<u4": [Uint32Array, 4] };

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

// {shape, data}, row-major. Throws an Error that says what is wrong.
export function parseNpy(file) {
  const magic = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59];
  if (file.length < 10 || magic.some((byte, i) => file[i] !== byte)) throw new Error("not a .npy file");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const long = file[6] > 1;
  const start = long ? 12 : 10;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  if (start + length > file.length) throw new Error("the header of the .npy file is cut off");
  const header = new TextDecoder("latin1").decode(file.subarray(start, start + length));
  const descr = /'descr':\s*'([^']*)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header)?.[1].split(",").map((part) => part.trim()).filter(Boolean).map(Number);
  if (!shape || /'fortran_order':\s*True/.test(header)) throw new Error("an order of the .npy file that is not read here");
  if (!(descr in KINDS)) throw new Error(`numbers of kind ${descr} are not read here`);
  const [Kind, width] = KINDS[descr];
  const size = shape.reduce((product, each) => product * each, 1);
  const body = file.slice(start + length, start + length + size * width); // a copy: aligned
  if (body.length !== size * width) throw new Error("the .npy file is cut off");
  return { shape, data: new Kind(body.buffer) };
}

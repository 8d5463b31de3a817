// Images -> inputs of the network, by the rules of ita_onnx/images.py.

const STRIDE = 32;

export function outputSize([height, width], size) {
  const has = (...keys) => Object.values(size).filter((side) => side !== null).length === keys.length &&
    keys.every((key) => size[key]);
  let found;
  if (has('height', 'width')) found = [size.height, size.width];
  else if (has('max_height', 'max_width')) {
    const scale = Math.min(size.max_height / height, size.max_width / width);
    found = [Math.trunc(height * scale), Math.trunc(width * scale)];
  } else if (has('shortest_edge', 'longest_edge')) found = byBothEdges(height, width, size);
  else {
    const scale = has('shortest_edge') ? size.shortest_edge / Math.min(height, width) : size.longest_edge / Math.max(height, width);
    found = [round(height * scale), round(width * scale)];
  }
  return found.map((side) => Math.max(1, side));
}

// Halves go to the even number, as in Python.
function round(value) {
  const down = Math.floor(value), rest = value - down;
  return rest === 0.5 ? down + (down % 2) : Math.round(value);
}

function byBothEdges(height, width, size) {
  const short = Math.min(height, width), long = Math.max(height, width);
  let shortest = size.shortest_edge, exact = shortest;
  if (long / short * shortest > size.longest_edge) {
    exact = size.longest_edge * short / long;
    shortest = round(exact);
  }
  if (short === shortest) return [height, width];
  const other = Math.trunc(exact * long / short);
  return width < height ? [other, shortest] : [shortest, other];
}

function resizeWeights(from, to) {
  const scale = from / to, support = Math.max(scale, 1), rows = [];
  let largest = 0;
  for (let place = 0; place < to; place += 1) {
    const center = scale * (place + 0.5);
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const count = Math.min(Math.trunc(center + support + 0.5), from) - first;
    const weights = Array.from({ length: count }, (_, step) =>
      Math.max(0, 1 - Math.abs((step + first - center + 0.5) * (1 / support))));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    for (let step = 0; step < count; step += 1) largest = Math.max(largest, weights[step] /= total);
    rows.push([first, weights]);
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits += 1;
  for (const [, weights] of rows) weights.forEach((weight, step) => { weights[step] = Math.floor(0.5 + weight * 2 ** bits); });
  return { rows, bits };
}

// (height, width, channels) of 8 bits along one axis: `outer` lines of `from` cells with `inner` numbers each.
function resizeAxis(pixels, outer, from, inner, to) {
  if (from === to) return pixels;
  const { rows, bits } = resizeWeights(from, to), half = 1 << (bits - 1);
  const result = new Uint8ClampedArray(outer * to * inner);
  for (let line = 0; line < outer; line += 1) {
    for (let place = 0; place < to; place += 1) {
      const [first, weights] = rows[place];
      for (let one = 0; one < inner; one += 1) {
        let total = half, source = (line * from + first) * inner + one;
        for (let step = 0; step < weights.length; step += 1, source += inner) total += weights[step] * pixels[source];
        result[(line * to + place) * inner + one] = total >> bits;
      }
    }
  }
  return result;
}

// RGB as (height, width, 3) -> {values (3, H, W), valid (H, W), size, padded}.
export function preprocess(rgb, height, width, settings) {
  const size = settings.do_resize === false ? [height, width] : outputSize([height, width], settings.size);
  const columns = resizeAxis(rgb, height, width, 3, size[1]);
  const pixels = resizeAxis(columns, 1, height, size[1] * 3, size[0]);
  const divisor = settings.size_divisor || STRIDE;
  const [H, W] = size.map((side) => Math.ceil(side / divisor) * divisor);
  const scale = Math.fround(1 / (settings.do_rescale === false ? 1 : settings.rescale_factor));
  const normalizes = settings.do_normalize !== false;
  const values = new Float32Array(3 * H * W), valid = new Uint8Array(H * W);
  for (let channel = 0; channel < 3; channel += 1) {
    const mean = normalizes ? Math.fround(Math.fround(settings.image_mean[channel]) * scale) : 0;
    const std = normalizes ? Math.fround(Math.fround(settings.image_std[channel]) * scale) : scale;
    for (let y = 0; y < size[0]; y += 1) {
      for (let x = 0; x < size[1]; x += 1) {
        values[(channel * H + y) * W + x] = (pixels[(y * size[1] + x) * 3 + channel] - mean) / std;
        valid[y * W + x] = 1;
      }
    }
  }
  return { values, valid, size, padded: [H, W] };
}

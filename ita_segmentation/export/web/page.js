// The page: inputs on the left, the result on the right. names.js and viewer.js are those of `ita app`.

import examples from './examples.js';
import names from './names.js';
import viewer from './viewer.js';
import { PALETTE, assignColors } from './colors.js';

const THRESHOLDS = { semantic: 0.5, panoptic: 0.8, instance: 0.5 };
const MAX_SHOWN_SIDE = 1600, MAX_PIXELS = 25e6, MAX_ABSENT_SHOWN = 60, MAX_NAMES = 1000, MAX_CHARACTERS = 200;
const part = (name) => document.querySelector(name);
const run = part('#ita-run'), state = part('.ita-state'), file = part('#ita-file'), upload = part('.ita-upload');
const preview = upload.querySelector('img'), remove = part('.ita-remove'), threshold = part('#ita-threshold');

const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
const waiting = new Map();
let turns = 0, chosen = null, ready = false, busy = false;

worker.onmessage = ({ data }) => {
  if (data.state) state.textContent = data.state;
  else {
    const { resolve, reject } = waiting.get(data.turn);
    waiting.delete(data.turn);
    if (data.error) reject(new Error(data.error));
    else resolve(data.result);
  }
};
worker.onerror = (event) => {
  event.preventDefault();
  state.textContent = 'The network cannot be loaded: ' + (event.message || 'the runtime cannot be reached') + '.';
};

function ask(what, input, transfer = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++turns, { resolve, reject });
    worker.postMessage({ turn: turns, what, input }, transfer);
  });
}

// What names.js and viewer.js take from their host: an element, properties, and a way to watch them.
async function mount(selector, html, script, initial) {
  const element = part(selector), watchers = [];
  element.innerHTML = await (await fetch(new URL(html, import.meta.url))).text();
  const props = new Proxy(initial, {
    set(target, name, value) {
      target[name] = value;
      for (const [watched, call] of watchers) if (watched === name) call();
      return true;
    },
  });
  script(element, props, (name, call) => watchers.push([name, call]));
  return props;
}

function changed() {
  window.itaInputs = (window.itaInputs || 0) + 1;
  window.dispatchEvent(new Event('ita-inputs'));
}

function refresh() {
  run.disabled = !ready || busy || !chosen;
  document.body.classList.toggle('ita-busy', busy);
}

async function take(blob, name) {
  try {
    if (!/^image\//.test(blob.type)) throw new Error(name + ' is not an image.');
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
    } catch {
      throw new Error(name + ' cannot be read as an image: please try a JPEG or PNG file.');
    }
    if (bitmap.width * bitmap.height > MAX_PIXELS) throw new Error(name + ' has more than 25 megapixels: please make it smaller.');
    if (chosen) chosen.bitmap.close();
    chosen = { bitmap, name };
    URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(blob);
    preview.alt = name;
    if (ready && !busy) state.textContent = '';
    changed();
  } catch (error) {
    state.textContent = error.message;
  }
  preview.hidden = remove.hidden = !chosen;
  upload.querySelector('span').hidden = Boolean(chosen);
  refresh();
}

function clear() {
  chosen = null;
  file.value = '';
  preview.hidden = remove.hidden = true;
  upload.querySelector('span').hidden = false;
  changed();
  refresh();
}

// RGB, transparency over white.
function pixelsOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.fillStyle = '#fff';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const pixels = new Uint8ClampedArray(bitmap.width * bitmap.height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    pixels[to++] = data[from];
    pixels[to++] = data[from + 1];
    pixels[to++] = data[from + 2];
  }
  return pixels;
}

async function dataUrl(width, height, draw) {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [width, height];
  draw(canvas.getContext('2d'));
  return canvas.toDataURL('image/png');
}

// Ids as colors: low byte in red, high byte in green; or gray, where a byte is enough.
function idImage(labels, width, height, isGray) {
  return dataUrl(width, height, (context) => {
    const image = context.createImageData(width, height);
    labels.forEach((id, place) => {
      const [low, high] = [id & 255, id >> 8];
      image.data.set(isGray ? [low, low, low, 255] : [low, high, 0, 255], 4 * place);
    });
    context.putImageData(image, 0, 0);
  });
}

function areasAndBoxes(labels, width) {
  const found = new Map();
  labels.forEach((id, place) => {
    const x = place % width, y = (place - x) / width, one = found.get(id);
    if (!one) found.set(id, { area: 1, left: x, right: x, top: y, bottom: y });
    else {
      one.area += 1;
      one.left = Math.min(one.left, x);
      one.right = Math.max(one.right, x);
      one.bottom = y;
    }
  });
  return found;
}

// Run lengths in COCO's order: down the columns, beginning with what is outside.
function runLengths(labels, id, width, height) {
  const counts = [];
  let inside = false, length = 0;
  for (let x = 0; x < width; x += 1) {
    for (let y = 0; y < height; y += 1) {
      if ((labels[y * width + x] === id) !== inside) {
        counts.push(length);
        length = 0;
        inside = !inside;
      }
      length += 1;
    }
  }
  return [...counts, length];
}

function cocoText(result, segments, name, width, height) {
  return JSON.stringify({
    images: [{ id: 1, file_name: name, width, height }],
    categories: result.classes.map((synonyms, index) => ({ id: index + 1, name: synonyms[0] })),
    annotations: segments.map((segment, place) => ({
      id: place + 1, image_id: 1, category_id: segment.class + 1, score: segment.score, iscrowd: 0, area: segment.area,
      bbox: segment.box, segmentation: { size: [height, width], counts: runLengths(result.labels, segment.id, width, height) },
    })),
  });
}

function pythonText(name, classes, task, least) {
  const list = classes.length ? JSON.stringify(classes.map((names) => (names.length > 1 ? names : names[0]))) : 'None';
  return `from ita_onnx import OnnxPredictor  # in the folder of this page: onnxruntime, numpy, Pillow, tokenizers

predictor = OnnxPredictor(".")
result = predictor(
    ${JSON.stringify(name)},  # a path
    ${list},
    ${JSON.stringify(task)},
    threshold=${least},
    distractors=True,
)
print(result)
`;
}

async function viewOf(result, typed, task, least, size, seconds) {
  const { bitmap, name } = chosen, [height, width] = size, pixels = width * height;
  const found = areasAndBoxes(result.labels, width);
  const segments = result.segments.filter((one) => found.has(one.id)).map((one) => {
    const { area, left, top, right, bottom } = found.get(one.id);
    return { ...one, share: area / pixels, area, box: [left, top, right - left + 1, bottom - top + 1] };
  }).sort((one, other) => other.area - one.area);
  const byClass = Map.groupBy ? Map.groupBy(segments, (one) => one.class) : new Map();
  if (!Map.groupBy) for (const one of segments) byClass.set(one.class, [...(byClass.get(one.class) || []), one]);
  const classes = [...byClass].map(([index, own]) => ({
    class: index, name: result.classes[index][0], synonyms: result.classes[index].slice(1),
    score: Math.max(...own.map((one) => one.score)), share: own.reduce((sum, one) => sum + one.share, 0), count: own.length,
  })).sort((one, other) => other.share - one.share);
  const colors = assignColors(classes.map((entry) => entry.class));
  for (const entry of classes) entry.color = PALETTE[colors.get(entry.class)];
  const absent = typed.length ? result.classes.filter((_, index) => !byClass.has(index)).map((names) => names[0]) : [];
  const image = await dataUrl(width, height, (context) => context.drawImage(bitmap, 0, 0, width, height));
  return {
    run: String(turns), name, task, width, height, image, seconds, segments, classes,
    ids: await idImage(result.labels, width, height, false),
    labels: await idImage(result.labels, width, height, segments.every((one) => one.id < 255)),
    absent: absent.slice(0, MAX_ABSENT_SHOWN), absent_count: absent.length,
    coco: cocoText(result, segments, name, width, height),
    python: pythonText(name, typed, task, least),
    remarks: notice ? [notice] : [],
  };
}

let notice = '', nameProps = null, viewProps = null;

async function segment() {
  const started = performance.now(), task = part('input[name=task]:checked').value, least = Number(threshold.value);
  const typed = Array.from(nameProps.value, (text) => text.split('|'));
  busy = true;
  window.itaAsked = window.itaInputs || 0;
  state.textContent = 'Segmenting…';
  refresh();
  try {
    const { bitmap } = chosen, pixels = pixelsOf(bitmap);
    const factor = Math.min(1, MAX_SHOWN_SIDE / Math.max(bitmap.width, bitmap.height));
    const target = [bitmap.height, bitmap.width].map((side) => Math.max(1, Math.round(factor * side)));
    const input = { pixels, height: bitmap.height, width: bitmap.width, classes: typed, task, threshold: least, target };
    const result = await ask('segment', input, [pixels.buffer]);
    viewProps.value = await viewOf(result, typed, task, least, target, (performance.now() - started) / 1000);
    window.itaLabels = result.labels;
    showBackend(result.backend);
    state.textContent = '';
  } catch (error) {
    viewProps.value = { error: error.message, run: String(turns) };
    state.textContent = '';
  }
  busy = false;
  refresh();
}

function showBackend(backend) {
  part('.ita-backend').textContent = backend === 'webgpu' ? 'WebGPU' : 'WebAssembly';
}

function showExamples() {
  const row = part('.ita-examples .ita-row');
  for (const example of examples) {
    const button = document.createElement('button'), image = document.createElement('img');
    button.type = 'button';
    button.setAttribute('aria-label', 'Take the example ' + example.name);
    image.src = example.url;
    image.alt = '';
    button.append(image);
    button.addEventListener('click', async () => {
      nameProps.value = example.classes;
      await take(await (await fetch(example.url)).blob(), example.name);
    });
    row.append(button);
  }
  part('.ita-examples').hidden = !examples.length;
}

function listen() {
  file.addEventListener('change', () => file.files[0] && take(file.files[0], file.files[0].name));
  remove.addEventListener('click', clear);
  run.addEventListener('click', segment);
  threshold.addEventListener('input', () => {
    part('.ita-least output').textContent = Number(threshold.value).toFixed(2);
    changed();
  });
  for (const radio of document.querySelectorAll('input[name=task]')) {
    radio.addEventListener('change', () => {
      threshold.value = THRESHOLDS[radio.value];
      threshold.dispatchEvent(new Event('input'));
    });
  }
  for (const name of ['dragover', 'dragleave', 'drop']) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      upload.classList.toggle('ita-over', name === 'dragover');
      const dropped = name === 'drop' && event.dataTransfer.files[0];
      if (dropped) take(dropped, dropped.name);
    });
  }
  document.addEventListener('paste', (event) => {
    const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
    if (pasted) take(pasted, pasted.name || 'pasted.png');
  });
}

async function begin() {
  const settings = await (await fetch(new URL('ita_onnx.json', import.meta.url))).json();
  nameProps = await mount('#ita-names', 'names.html', names, {
    value: [], own_names: settings.classes.map((synonyms) => synonyms[0]), max_names: MAX_NAMES, max_characters: MAX_CHARACTERS,
  });
  new MutationObserver(changed).observe(part('#ita-names .ita-tags'), { childList: true });
  viewProps = await mount('#ita-result', 'viewer.html', viewer, { value: null });
  if (settings.domain) notice = 'Note: this checkpoint was trained on ' + settings.domain + '; do not expect it to segment anything else well.';
  listen();
  showExamples();
  try {
    const { backend } = await ask('start', new URL(location.href).searchParams.get('backend'));
    ready = true;
    showBackend(backend);
    state.textContent = chosen ? '' : 'Ready.';
  } catch (error) {
    state.textContent = 'The network cannot be loaded: ' + error.message + '.';
  }
  refresh();
}

begin();

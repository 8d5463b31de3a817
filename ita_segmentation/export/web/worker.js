// Everything that takes time, off the page's thread: loading, encoding names, the network, post-processing.

import { load } from './onnxruntime.js';
import { preprocess } from './images.js';
import { instanceSegments, panopticSegments, semanticMap } from './postprocessing.js';
import { Tokenizer } from './tokenizer.js';
import { OTHER, classesAmong, distinct, isDuplicate, withDistractors } from './vocabulary.js';

const PROMPTS_PER_BATCH = 128;
const sessions = {};
let ort, settings, processor, embeds, tokenizer, backends;

async function read(name, kind = 'json') {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error('the file ' + name + ' cannot be loaded (' + answer.status + ')');
  return answer[kind]();
}

// {name: [shape, Float32Array]} of a safetensors file.
function parseSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const arrays = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const [first, last] = entry.data_offsets;
    arrays[name] = [entry.shape, new Float32Array(buffer.slice(8 + length + first, 8 + length + last))];
  }
  return arrays;
}

async function start(wanted) {
  const [names, buffer] = await Promise.all([read('vocabulary.json'), read('vocabulary.safetensors', 'arrayBuffer')]);
  [settings, processor] = await Promise.all([read('ita_onnx.json'), read('preprocessor_config.json')]);
  const { prompt_embeds: [[, width], prompts], name_embeds: [, alone] } = parseSafetensors(buffer);
  const row = (values, place) => values.subarray(place * width, (place + 1) * width);
  embeds = new Map(names.map((name, place) => [name, [row(prompts, place), row(alone, place)]]));
  const adapter = wanted !== 'wasm' && navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
  backends = adapter ? ['webgpu', 'wasm'] : ['wasm'];
  ort = await load(Boolean(adapter));
  await session('model.onnx');
  return { backend: backends[0], classes: settings.classes, domain: settings.domain };
}

async function session(file) {
  if (!sessions[file]) {
    const network = await read(file, 'arrayBuffer');
    sessions[file] = await ort.InferenceSession.create(network, { executionProviders: backends });
  }
  return sessions[file];
}

// Runs a network; where the GPU cannot, the rest is done by WebAssembly.
async function run(file, inputs) {
  const tensors = Object.fromEntries(Object.entries(inputs).map(([name, [kind, values, shape]]) => [name, new ort.Tensor(kind, values, shape)]));
  try {
    return await (await session(file)).run(tensors);
  } catch (error) {
    if (backends[0] === 'wasm') throw error;
    backends = ['wasm'];
    for (const name of Object.keys(sessions)) delete sessions[name];
    return (await session(file)).run(tensors);
  }
}

function normalized(vector) {
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return vector.map((value) => value / length);
}

async function embed(names, report) {
  const missing = [...new Set(names)].filter((name) => !embeds.has(name));
  if (!missing.length) return;
  report('Encoding new names…');
  tokenizer ??= new Tokenizer(await read('tokenizer.json'), settings.context_length, settings.pads_tokens);
  const templates = ['{}', ...settings.templates], step = Math.max(1, Math.floor(PROMPTS_PER_BATCH / templates.length));
  for (let start = 0; start < missing.length; start += step) {
    const block = missing.slice(start, start + step);
    const prompts = block.flatMap((name) => templates.map((template) => template.split('{}').join(name)));
    const { tokens, shape } = tokenizer.tokenize(prompts);
    const { embeds: { data, dims: [, width] } } = await run('text.onnx', { tokens: ['int64', tokens, shape] });
    block.forEach((name, place) => {
      const row = (index) => data.slice((place * templates.length + index) * width, (place * templates.length + index + 1) * width);
      const mean = new Float32Array(width);
      for (let index = 1; index < templates.length; index += 1) row(index).forEach((value, at) => { mean[at] += value / (templates.length - 1); });
      embeds.set(name, [normalized(mean), row(0)]);
    });
  }
}

function stacked(names, kind) {
  const rows = names.map((name) => embeds.get(name)[kind]), width = rows[0].length;
  const values = new Float32Array(rows.length * width);
  rows.forEach((row, place) => values.set(row, place * width));
  return { values, width };
}

// A vocabulary as the network takes it; one with too few names is filled up with some that are selected last.
function textInputs(classes) {
  const names = classes.flat(), candidates = distinct([...names, OTHER]), byClass = settings.dominant_category_source === 'cells';
  const most = settings.num_dominant_categories;
  const padding = most ? Math.max(0, most - (byClass ? classes.length : candidates.length)) : 0;
  if (padding && settings.decoder_self_attention) throw new Error('this network takes at least ' + most + ' names');
  const [ofNames, ofClasses] = byClass ? [padding, padding] : [0, 0];
  const last = (list, count) => [...list, ...Array(count).fill(list[list.length - 1])];
  const prompts = stacked(last(names, ofNames), 0), alone = stacked(candidates, 1);
  const nameEmbeds = new Float32Array((candidates.length + (byClass ? 0 : padding)) * alone.width);
  nameEmbeds.set(alone.values);
  const classOf = classes.flatMap((synonyms, index) => synonyms.map(() => index));
  for (let index = 0; index < ofNames; index += 1) classOf.push(classes.length + index);
  const trained = settings.train_vocabulary.flat(), bools = (list) => Uint8Array.from(list, Number);
  const seen = last(classesAmong(classes, trained), ofClasses);
  const duplicate = [...isDuplicate(classes), ...Array(ofClasses).fill(true)];
  const inputs = {
    prompt_embeds: ['float32', prompts.values, [classOf.length, prompts.width]],
    class_of_name: ['int64', BigInt64Array.from(classOf, BigInt), [classOf.length]],
    name_embeds: ['float32', nameEmbeds, [nameEmbeds.length / alone.width, alone.width]],
    is_seen: ['bool', bools(seen), [seen.length]],
    is_duplicate: ['bool', bools(duplicate), [duplicate.length]],
  };
  return { inputs, padding, classesInNetwork: seen.length };
}

// Leaves out the queries and classes that a vocabulary was filled up with.
function withoutPadding(found, text, classes) {
  const [, all, columns] = found.class_log_probabilities.dims, [, , h, w] = found.mask_logits.dims;
  const selected = found.dominant ? found.dominant.dims[1] : 0, kept = [];
  for (let query = 0; query < all; query += 1) if (query < selected - text.padding || query >= selected) kept.push(query);
  const logProbs = new Float32Array(kept.length * (classes.length + 1)), masks = new Float32Array(kept.length * h * w);
  kept.forEach((query, place) => {
    const row = found.class_log_probabilities.data.subarray(query * columns, (query + 1) * columns);
    logProbs.set(row.subarray(0, classes.length), place * (classes.length + 1));
    logProbs[(place + 1) * (classes.length + 1) - 1] = row[columns - 1];
    masks.set(found.mask_logits.data.subarray(query * h * w, (query + 1) * h * w), place * h * w);
  });
  return { logProbs, masks, queries: kept.length, classes: classes.length, maskSize: [h, w] };
}

async function segment({ pixels, height, width, classes, task, threshold, target }, report) {
  const own = !classes.length, given = own ? settings.classes : classes;
  if (!given.length) throw new Error('This model has no classes of its own: please type at least one class name.');
  const competing = own ? given : withDistractors(given, settings.own_classes, settings.train_vocabulary);
  await embed([...competing.flat(), OTHER], report);
  report('Segmenting…');
  const text = textInputs(competing), image = preprocess(pixels, height, width, processor), [H, W] = image.padded;
  const found = await run('model.onnx', {
    pixel_values: ['float32', image.values, [1, 3, H, W]],
    valid: ['bool', image.valid, [1, H, W]],
    ...text.inputs,
  });
  const outputs = { ...withoutPadding(found, text, competing), imageSize: image.size, targetSize: target || [height, width] };
  if (outputs.masks.some(Number.isNaN)) throw new Error('The network gives values that are not numbers.');
  const stuff = new Set(classesAmong(competing, settings.stuff_names).flatMap((is, index) => (is ? [index] : [])));
  if (task === 'semantic') return { ...semanticMap(outputs, threshold, given.length), classes: given };
  const find = task === 'panoptic' ? panopticSegments : instanceSegments;
  return { ...find(outputs, threshold, given.length, stuff), classes: given };
}

self.onmessage = async ({ data: { turn, what, input } }) => {
  const report = (state) => self.postMessage({ turn, state });
  try {
    const result = await (what === 'start' ? start(input) : segment(input, report));
    self.postMessage({ turn, result: { ...result, backend: backends[0] } });
  } catch (error) {
    self.postMessage({ turn, error: String(error.message || error) });
  }
};

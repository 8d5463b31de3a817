// Outputs of the network -> label maps and segments, by the rules of ita_onnx/postprocessing.py.
// `outputs`: logProbs (Q x K + 1) and masks (Q x h x w) with their sizes, imageSize, targetSize [height, width].

const MAX_INSTANCES = 100, MASK_STRIDE = 4, NEGLIGIBLE = 1e-6;
export const NO_CLASS = 65535;

const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));

// Rows of probabilities, void last.
export function classProbabilities({ logProbs, queries, classes }) {
  return Array.from({ length: queries }, (_, query) => {
    const row = logProbs.subarray(query * (classes + 1), (query + 1) * (classes + 1));
    const top = row.reduce((most, value) => Math.max(most, value), -Infinity);
    const powers = Float32Array.from(row, (value) => Math.exp(value - top));
    const total = powers.reduce((sum, value) => sum + value, 0);
    return powers.map((value) => value / total);
  });
}

function bilinear(from, to) {
  return Array.from({ length: to }, (_, place) => {
    if (from === to) return [[place, 1]];
    const exact = Math.max((place + 0.5) * (from / to) - 0.5, 0);
    const lower = Math.min(Math.trunc(exact), from - 1), upper = Math.min(lower + 1, from - 1);
    return upper === lower ? [[lower, 1]] : [[lower, 1 - (exact - lower)], [upper, exact - lower]];
  });
}

// Where each target pixel takes its value: masks are resized to the input, cropped, and resized.
function taps(cells, image, target) {
  const toInput = bilinear(cells, cells * MASK_STRIDE).slice(0, image);
  return bilinear(image, target).map((pairs) => {
    const found = new Map();
    for (const [place, share] of pairs)
      for (const [cell, weight] of toInput[place]) found.set(cell, (found.get(cell) || 0) + share * weight);
    return [...found].filter(([, weight]) => weight !== 0);
  });
}

// Calls visit(y, logits) for each row of the result; logits[place * width + x] is of the place-th of the queries.
function eachRow(outputs, queries, visit) {
  const { masks, maskSize: [h, w], imageSize, targetSize: [height, width] } = outputs;
  const [rows, columns] = imageSize.map((side) => Math.ceil(side / 32) * 32 / MASK_STRIDE);
  const down = taps(rows, imageSize[0], height), across = taps(columns, imageSize[1], width);
  const line = new Float32Array(columns), logits = new Float32Array(queries.length * width);
  for (let y = 0; y < height; y += 1) {
    queries.forEach((query, place) => {
      line.fill(0);
      for (const [cell, weight] of down[y]) {
        const start = (query * h + cell) * w;
        for (let x = 0; x < columns; x += 1) line[x] += weight * masks[start + x];
      }
      for (let x = 0; x < width; x += 1) {
        let total = 0;
        const own = across[x];
        for (let step = 0; step < own.length; step += 1) total += own[step][1] * line[own[step][0]];
        logits[place * width + x] = total;
      }
    });
    visit(y, logits);
  }
}

// The class of the highest sum over q of p_q(c) m_q(x). Terms below a millionth are left out.
export function semanticMap(outputs, threshold, numClasses) {
  const { classes, targetSize: [height, width] } = outputs;
  const probabilities = classProbabilities(outputs), every = probabilities.map((_, query) => query);
  const likely = probabilities.map((row) => {
    const kept = [];
    for (let one = 0; one < classes; one += 1) if (row[one] > NEGLIGIBLE) kept.push(one);
    return kept;
  });
  const labels = new Uint16Array(height * width), sums = new Float32Array(classes), present = new Float32Array(every.length);
  const totals = new Float64Array(classes), counts = new Float64Array(classes);
  eachRow(outputs, every, (y, logits) => {
    for (let x = 0; x < width; x += 1) {
      sums.fill(0);
      for (let query = 0; query < every.length; query += 1) {
        const mask = sigmoid(logits[query * width + x]), row = probabilities[query], own = likely[query];
        present[query] = mask;
        if (mask > NEGLIGIBLE) for (let step = 0; step < own.length; step += 1) sums[own[step]] += mask * row[own[step]];
      }
      let best = 0;
      for (let one = 1; one < classes; one += 1) if (sums[one] > sums[best]) best = one;
      let misses = 1;
      for (let query = 0; query < every.length; query += 1) misses *= 1 - present[query] * probabilities[query][best];
      const shown = 1 - misses, is = best < numClasses && shown >= threshold;
      labels[y * width + x] = is ? best : NO_CLASS;
      if (is) {
        totals[best] += shown;
        counts[best] += 1;
      }
    }
  });
  const segments = [];
  for (let one = 0; one < classes; one += 1)
    if (counts[one]) segments.push({ id: one, class: one, score: totals[one] / counts[one] });
  return { labels, segments };
}

export function panopticSegments(outputs, threshold, numClasses, stuff, maskThreshold = 0.5, overlap = 0.8) {
  const { classes, targetSize: [height, width] } = outputs, kept = [];
  classProbabilities(outputs).forEach((row, query) => {
    let label = 0;
    for (let one = 1; one <= classes; one += 1) if (row[one] > row[label]) label = one;
    if (label !== classes && row[label] > threshold) kept.push({ query, label, score: row[label], own: 0, won: 0, both: 0, id: 0 });
  });
  const winners = new Int32Array(height * width).fill(-1), labels = new Uint16Array(height * width);
  if (!kept.length) return { labels, segments: [] };
  eachRow(outputs, kept.map((one) => one.query), (y, logits) => {
    for (let x = 0; x < width; x += 1) {
      let best = 0, most = -1, inside = false;
      for (let place = 0; place < kept.length; place += 1) {
        const mask = sigmoid(logits[place * width + x]), isOwn = mask >= maskThreshold;
        if (isOwn) kept[place].own += 1;
        if (mask * kept[place].score > most) [best, most, inside] = [place, mask * kept[place].score, isOwn];
      }
      kept[best].won += 1;
      if (inside) {
        kept[best].both += 1;
        winners[y * width + x] = best;
      }
    }
  });
  const segments = [], fused = new Map();
  for (const one of kept) {
    if (one.label >= numClasses || !one.own || !one.won || !one.both || one.won / one.own < overlap) continue;
    let segment = fused.get(one.label);
    if (segment) segment.score = Math.max(segment.score, one.score);
    else {
      segment = { id: segments.length + 1, class: one.label, score: one.score };
      segments.push(segment);
      if (stuff.has(one.label)) fused.set(one.label, segment);
    }
    one.id = segment.id;
  }
  for (let place = 0; place < labels.length; place += 1) if (winners[place] >= 0) labels[place] = kept[winners[place]].id;
  return { labels, segments };
}

export function instanceSegments(outputs, threshold, numClasses, stuff, maskThreshold = 0.5) {
  const { classes, targetSize: [height, width] } = outputs, pairs = [];
  classProbabilities(outputs).forEach((row, query) => {
    for (let label = 0; label < classes; label += 1) pairs.push({ query, label, score: row[label] });
  });
  pairs.sort((one, other) => other.score - one.score);
  const kept = pairs.slice(0, MAX_INSTANCES).filter((one) => !stuff.has(one.label) && one.label < numClasses && one.score > 0);
  const queries = [...new Set(kept.map((one) => one.query))].sort((one, other) => one - other);
  const labels = new Uint16Array(height * width), cut = Math.log(maskThreshold / (1 - maskThreshold));
  const areas = new Float64Array(queries.length), sums = new Float64Array(queries.length);
  if (!queries.length) return { labels, segments: [] };
  eachRow(outputs, queries, (y, logits) => {
    for (let place = 0; place < queries.length; place += 1) {
      for (let x = 0; x < width; x += 1) {
        const logit = logits[place * width + x];
        if (logit > cut) {
          areas[place] += 1;
          sums[place] += sigmoid(logit);
        }
      }
    }
  });
  for (const one of kept) {
    one.place = queries.indexOf(one.query);
    one.score *= sums[one.place] / Math.max(areas[one.place], 1);
  }
  const chosen = kept.filter((one) => areas[one.place] > 0 && one.score >= threshold);
  chosen.sort((one, other) => other.score - one.score);
  eachRow(outputs, queries, (y, logits) => {
    for (let number = chosen.length; number > 0; number -= 1) { // the best is drawn last
      const start = chosen[number - 1].place * width;
      for (let x = 0; x < width; x += 1) if (logits[start + x] > cut) labels[y * width + x] = number;
    }
  });
  return { labels, segments: chosen.map((one, place) => ({ id: place + 1, class: one.label, score: one.score })) };
}

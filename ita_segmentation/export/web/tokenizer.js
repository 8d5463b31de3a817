// CLIP's byte-pair tokenizer, from the tokenizer.json that the export wrote.

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu;

// Bytes as the printable characters of which the vocabulary's tokens are made.
function byteCharacters() {
  const printable = [[33, 126], [161, 172], [174, 255]].flatMap(([first, last]) =>
    Array.from({ length: last - first + 1 }, (_, place) => first + place));
  const characters = new Array(256);
  for (const byte of printable) characters[byte] = String.fromCharCode(byte);
  let next = 256;
  for (let byte = 0; byte < 256; byte += 1) characters[byte] ??= String.fromCharCode(next++);
  return characters;
}

export class Tokenizer {
  constructor(document, contextLength, padded) {
    const { vocab, merges } = document.model;
    const steps = document.normalizer.normalizers;
    this.ids = vocab;
    this.ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(' ') : pair, rank]));
    this.replaced = new Map(
      steps.filter((step) => step.type === 'Replace' && 'String' in step.pattern)
        .map((step) => [step.pattern.String, step.content]));
    this.lowers = steps.some((step) => step.type === 'Lowercase');
    const special = Object.fromEntries(document.added_tokens.map((token) => [token.content, token.id]));
    [this.start, this.end] = [special['<start_of_text>'], special['<end_of_text>']];
    this.contextLength = contextLength;
    this.padded = padded;
    this.characters = byteCharacters();
    this.known = new Map();
  }

  clean(text) {
    const plain = Array.from(text, (one) => this.replaced.get(one) ?? one).join('');
    const composed = plain.normalize('NFC').replace(/\s+/g, ' ').trim();
    return this.lowers ? composed.toLowerCase() : composed;
  }

  encode(text) {
    const words = this.clean(text).match(WORDS) || [];
    return words.flatMap((word) => this.encodeWord(word));
  }

  encodeWord(word) {
    if (!this.known.has(word)) {
      const bytes = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
      bytes[bytes.length - 1] += '</w>';
      this.known.set(word, this.merge(bytes).map((part) => this.ids[part]));
    }
    return this.known.get(word);
  }

  merge(parts) {
    while (parts.length > 1) {
      let best = Infinity, first = null, second = null;
      for (let place = 0; place + 1 < parts.length; place += 1) {
        const rank = this.ranks.get(parts[place] + ' ' + parts[place + 1]);
        if (rank < best) [best, first, second] = [rank, parts[place], parts[place + 1]];
      }
      if (first === null) break;
      const merged = [];
      for (let place = 0; place < parts.length; place += 1) {
        if (parts[place] === first && parts[place + 1] === second) {
          merged.push(first + second);
          place += 1;
        } else merged.push(parts[place]);
      }
      parts = merged;
    }
    return parts;
  }

  // Rows of one length, from the start token to the end token, then zeros; what goes beyond the context is cut off.
  tokenize(prompts) {
    const most = this.contextLength - 2, encoded = prompts.map((prompt) => this.encode(prompt));
    const longest = this.padded ? most : Math.min(Math.max(...encoded.map((codes) => codes.length)), most);
    const length = longest + 2, tokens = new BigInt64Array(prompts.length * length);
    encoded.forEach((codes, row) => {
      [this.start, ...codes.slice(0, most), this.end].forEach((code, place) => {
        tokens[row * length + place] = BigInt(code);
      });
    });
    return { tokens, shape: [prompts.length, length] };
  }
}

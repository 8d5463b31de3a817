// Colors of classes. PALETTE and DISTANCES are those of `ita predict`; the export writes them.

import { DISTANCES, PALETTE } from './palette.js';

export { PALETTE };
const MIN_DISTANCE = 0.16;

// Class -> place in the palette; earlier classes choose first, later ones take a color that is not near theirs.
export function assignColors(classes) {
  const places = new Map(), count = PALETTE.length;
  for (const index of classes) {
    let place = index % count;
    const used = [...new Set(places.values())];
    if (used.length) {
      const nearest = (one) => Math.min(...used.map((other) => DISTANCES[one][other]));
      const order = Array.from({ length: count }, (_, step) => (place + step) % count);
      const far = order.filter((one) => nearest(one) >= MIN_DISTANCE);
      const best = order.reduce((one, other) => (nearest(other) > nearest(one) ? other : one));
      if (far.length || nearest(best) > 0) place = far.length ? far[0] : best;
    }
    places.set(index, place);
  }
  return places;
}

"""Results in other tools' terms: COCO JSON and RLE, `supervision`, FiftyOne."""

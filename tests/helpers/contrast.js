// Contrast (WCAG 2.2) of every visible text with what is behind it, lowest first: [[ratio, text], ...].
() => {
  const channels = (color) => {
    const context = document.createElement('canvas').getContext('2d');
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const luminance = (color) => {
    const [red, green, blue] = color.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const colors = [];
    for (let one = element; one; one = one.parentElement) colors.push(channels(getComputedStyle(one).backgroundColor));
    return colors.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const contrast = (element, color) => {
    const back = behind(element), [low, high] = [luminance(over(channels(color), back)), luminance(back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const isVisible = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length;
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (text && isVisible(element) && !['SCRIPT', 'STYLE'].includes(element.tagName))
      found.push([contrast(element, getComputedStyle(element).color), text]);
  }
  for (const input of document.querySelectorAll('input[placeholder]'))
    if (isVisible(input)) found.push([contrast(input, getComputedStyle(input, '::placeholder').color), input.placeholder]);
  return found.sort((a, b) => a[0] - b[0]);
}

() => {
  // a message's copy button takes the HTML that shows the message
  if (!navigator.clipboard || navigator.clipboard.ofText) return [];
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (html) => write(html.replaceAll("&lt;", "<").replaceAll("&amp;", "&"));
  navigator.clipboard.ofText = true;
  return [];
}

"""What the app's page says beside its conversations, and how it looks."""

FAILED = (
    "**Not answered:** too many messages are waiting, or the server failed. Try again in a moment."
)
# what an empty page offers to ask
EXAMPLES = [
    {"text": "Tell me the colour of an elephant."},
    {"text": "Write a short poem about rain."},
    {"text": "Explain in two sentences why the sky is blue."},
]
BETTER = {"left": "Left is better", "tie": "Tie", "right": "Right is better"}
# both columns of a conversation, as gradio's Chatbot takes them
COLUMN = {"height": "45vh", "buttons": ["copy", "copy_all"], "allow_tags": False}
COLUMN |= {"latex_delimiters": [], "min_width": 280, "render_markdown": False}
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

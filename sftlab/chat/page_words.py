"""What the app's page says beside its conversations."""

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

"""What may go wrong where a model runs on the meta device, on tensors without numbers?"""

# What a model may raise that cannot run without numbers.
NOT_WITHOUT_NUMBERS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

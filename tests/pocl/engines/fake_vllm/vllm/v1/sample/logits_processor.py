class AdapterLogitsProcessor:
    def __init__(self, *_: object) -> None:
        pass

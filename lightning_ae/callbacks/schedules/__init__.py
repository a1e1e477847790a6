"""Numbers of a model that change while it trains.

``curves`` are the public callbacks, ``schedule`` is what they share: when a number is set, logged and resumed.
``targets`` find it by its dotted path, ``reads`` see whether anything reads it.
"""

from lightning_ae.callbacks.schedules.curves import CosineSchedule, CyclicalSchedule, LinearSchedule

__all__ = ["CosineSchedule", "CyclicalSchedule", "LinearSchedule"]

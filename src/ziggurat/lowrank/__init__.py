"""The mathematics on one factor pair: composing it, multiplying by it, measuring it. Needs torch only."""

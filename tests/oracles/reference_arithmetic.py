"""Textbook twins of the code-table quantizers and of run-time integer arithmetic.

From QLoRA (arXiv:2305.14314), 8-bit Optimizers (arXiv:2110.02861, dynamic quantization) and
LLM.int8() (arXiv:2208.07339); float64, explicit loops.
"""

from __future__ import annotations

import statistics

import numpy as np


def nf4_table() -> list[float]:
    """NormalFloat4: quantiles of N(0, 1), 8 above zero and 7 below, zero exact, scaled to ±1."""
    # The paper's average of the outermost quantiles, 1/2 (1/32 + 1/30) from either end.
    outermost = 0.9677083
    quantile = statistics.NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [quantile(outermost - step * index) for index in range(count)]

    values = sorted([*half(8), 0.0, *(-value for value in half(7))])
    return [value / values[-1] for value in values]


def fp4_table() -> list[float]:
    """bitsandbytes' FP4 by code: sign, two exponent bits, one of mantissa; scaled to ±1."""
    magnitudes = []
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        if exponent == 0:
            magnitudes.append(0.0625 * mantissa)
        else:
            # Exponent field 1 is the largest: 8 and 12, then 2 lower binades.
            power = {1: 8, 2: 4, 3: 2}[exponent]
            magnitudes.append(power * (1 + mantissa / 2))
    return [value / 12 for value in magnitudes] + [-value / 12 for value in magnitudes]


def dynamic_table() -> list[float]:
    """Signed 8-bit dynamic map: seven decades, each decade cut in twice as many parts."""
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        for part in range(parts):
            low, high = (0.1 + 0.9 * edge / parts for edge in (part, part + 1))
            middle = (low + high) / 2 * 10.0 ** (exponent - 6)
            values += [middle, -middle]
    return sorted(values)


def nearest(value: float, table) -> tuple[int, float]:
    """Code of the nearest entry and how much nearer it is than the second, in half gaps."""
    distances = sorted((abs(value - entry), code) for code, entry in enumerate(table))
    return distances[0][1], distances[1][0] - distances[0][0]


def blockwise(values, table, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, margins and absolute maxima of blocks of a flat list."""
    codes, margins, maxima = [], [], []
    for start in range(0, len(values), block):
        part = [float(value) for value in values[start : start + block]]
        maximum = max(abs(value) for value in part)
        maxima.append(maximum)
        for value in part:
            code, margin = nearest(value / maximum if maximum else 0.0, table)
            codes.append(code)
            margins.append(margin)
    return np.array(codes), np.array(margins), np.array(maxima)


def rowwise_int8(matrix) -> tuple[np.ndarray, np.ndarray]:
    """Vector-wise quantization: signed codes round(127 w / max|w|) and the maxima of rows."""
    codes = np.zeros(matrix.shape, dtype=np.int64)
    maxima = np.zeros(matrix.shape[0])
    for row, values in enumerate(matrix):
        maxima[row] = max(abs(float(value)) for value in values)
        for column, value in enumerate(values):
            codes[row, column] = round(127 * float(value) / maxima[row]) if maxima[row] else 0
    return codes, maxima


def int8_product(inputs, codes, scales) -> np.ndarray:
    """W8A8 with dynamic per-token scales: integer products, then both scales."""
    input_codes, maxima = rowwise_int8(inputs)
    output = np.zeros((len(inputs), len(codes)))
    for token in range(len(inputs)):
        for row in range(len(codes)):
            accumulated = sum(
                int(x) * int(w) for x, w in zip(input_codes[token], codes[row], strict=True)
            )
            output[token, row] = accumulated * (maxima[token] / 127) * scales[row]
    return output


def llm_int8_product(inputs, codes, weight_maxima, threshold: float) -> np.ndarray:
    """Equation 8: outlier columns in high precision, the others in int8.

    As in bitsandbytes, a token's scale comes from all values below the threshold, and both parts
    use the dequantized int8 weight.
    """
    tokens, columns = inputs.shape
    above = np.abs(inputs) >= threshold
    outliers = {c for c in range(columns) if any(above[t, c] for t in range(tokens))}
    output = np.zeros((tokens, len(codes)))
    for token in range(tokens):
        below = [abs(float(x)) for x in inputs[token] if abs(x) < threshold]
        maximum = max(below, default=0.0)
        for row in range(len(codes)):
            accumulated, exact = 0, 0.0
            for column in range(columns):
                if column in outliers:
                    weight = int(codes[row, column]) * weight_maxima[row] / 127
                    exact += float(inputs[token, column]) * weight
                elif maximum:
                    code = round(127 * float(inputs[token, column]) / maximum)
                    accumulated += code * int(codes[row, column])
            output[token, row] = exact + accumulated * maximum * weight_maxima[row] / 127**2
    return output


def static_product(inputs, weights, scale: float, kind: str) -> np.ndarray:
    """Outputs with one calibrated scale for all inputs; larger ones saturate.

    int8: round(x / s) to -128..127. fp8: x / s to the nearest E4M3, at most 448.
    """
    import reference_microscaling as floats

    output = np.zeros((len(inputs), len(weights)))
    for token, values in enumerate(inputs):
        if kind == "int8":
            codes = [min(max(round(float(value) / scale), -128), 127) for value in values]
        else:
            codes = [floats.nearest(float(value) / scale, floats.E4M3) for value in values]
        for row, weight in enumerate(weights):
            output[token, row] = scale * sum(
                c * float(w) for c, w in zip(codes, weight, strict=True)
            )
    return output


def int4_fp8_row(codes, scales, width: int) -> list[float]:
    """One row of int4 weights as a kernel of FP8 products has them.

    Codes are signed. Group scales become E4M3 relative to the row's largest (448 for it), then an
    eighth of that; code times scale is rounded to E4M3 once more; the row's factor comes last.
    """
    import reference_microscaling as floats

    channel = max(scales) / 448
    small = [
        floats.nearest(floats.nearest(s / channel, floats.E4M3) / 8, floats.E4M3) for s in scales
    ]
    return [
        floats.nearest(code * small[column // width], floats.E4M3) * channel * 8
        for column, code in enumerate(codes)
    ]

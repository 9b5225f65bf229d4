// Error messages for rows that are not probability distributions, in the words of torch.multinomial. Macros,
// for the messages of the host and the assertions of a device.
#pragma once

#define BIGRAMX_INVALID_PROBS "probability tensor contains either `inf`, `nan` or element < 0"
#define BIGRAMX_ZERO_PROBS "invalid multinomial distribution (sum of probabilities <= 0)"
#define BIGRAMX_INVALID_LOGITS \
    "divided by the temperature, holds a NaN, an infinity, or nothing but negative infinities"

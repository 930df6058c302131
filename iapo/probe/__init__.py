"""How the exit entropies are measured. Read the folder in this order:

1. `naive`: the definition in a few lines, one plain forward per position, and the comparison of a model with it.
2. `measure`: the exact fast pass over completions.
3. `batch`: from a padded batch to completions, with every check of the input.
4. `packing`: which tokens go through the model together, and who sees whom. Integers only.
5. `attention`: how many probes read one shared copy of keys and values.
6. `output_layer`: entropies and log-probabilities in float32 without holding all logits.
7. `supported_models`: which models are refused, and why.
8. `text`: what a response's text says about its tokens.

`iapo.information` is the public face.
"""

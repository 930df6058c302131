"""How the exit entropies are measured. Read the folder in this order:

1. `naive`: the definition in a few lines, one plain forward per position, and the comparison of a model with it.
2. `measure`: the exact fast pass over completions.
3. `batch`: from a padded batch to completions, with every check of the input.
4. `visibility`: how "who sees what" is written down: ranges of queries and of keys.
5. `packing`: which tokens go through the model together, and who sees whom. Integers only.
6. `joins`: probes as the tokenizer would write them after the text before.
7. `attention`: how many probes read one shared copy of keys and values.
8. `kernels`: attention over one range of keys, and the merge of several ranges.
9. `module_forward`: the forward of a module, replaced for a while or limited to some tokens.
10. `output_layer`: entropies and log-probabilities in float32 without holding all logits.
11. `supported_models`: which models are refused, and why.
12. `text`: what a response's text says about its tokens.

`iapo.information` is the public face.
"""

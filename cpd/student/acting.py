"""How a student's description says that the student acts: enough to act without this code."""

from __future__ import annotations

from typing import Final

#: Step by step, in terms of the description's other entries (`acting` has the constants) and of the tensors.
STEPS: Final = (
    "all is in dtype unless a step says otherwise; a task is its position in distinct_tasks, from 0; with tensors "
    "owner.*, a task acts with the weights of its latest stage only; with packing.up.i.stack, U, and "
    "packing.down.i.stack, V, it adds U[task] V[task] to the i-th tensor of embed.weight, for each block "
    "attention.qkv.weight, attention.out.weight, moe.up.stack and moe.down.stack, and head.weight; with "
    "packing.embedding.stack, e, it multiplies row f of moe.down.stack of block l by sigmoid(400 e[task, l, f])",
    "scaled(o) = (o - obs_centre) / obs_scale for an observation o; 0 in the ranges student.unobserved",
    "task: none if student.task_identity is 'none'; the episode's own if it is 'given' or 'onehot'; if it is "
    "'inferred', that of the plan, which the next five steps choose from the episode's first observation o",
    "evidence s, float64: 0 for each task k of known_K, -inf for the others",
    "unless student.belief is 'embedding' or a task of known_K has density.num_K 0: for each k with "
    "n = density.num_K[k] > 0, s[k] += (sum over o's entries outside student.unobserved of the log density of "
    "Student's t with max(n - 1, 1) degrees of freedom, location density.mean_KO[k] and scale "
    "density.std_KO[k] sqrt(1 + 1/n)) divided by density_temperature",
    "unless student.belief is 'density': s[k] += (z . prototypes_KZ[k]) / embedding_temperature, with z = "
    "encoder.linear(x) + encoder.out(gelu(encoder.hidden(x))) of x = scaled(o), divided by its Euclidean length",
    "belief b = softmax(s), float64; uniform if known_K is empty",
    "plan: if student.act is 'most_likely', the task of the greatest b, twice; otherwise plans.tasks_P2[p] of the "
    "greatest value of b . plans.success_PK[p], plus tie_break b[p] for p < num_tasks; if student.act is "
    "'expected_success', only p < num_tasks count; the first of its tasks is that of first_steps steps, the "
    "second that of all later ones",
    "x[i] = embed(scaled(o[i])) + position[i] + task[task], for the last student.context observations o",
    "for each block: x += attention(attention_norm(x)), then x += moe(moe_norm(x)); layer norms with norm_eps",
    "attention: the thirds of qkv(x) are q, k, v, each of student.num_heads heads of equal consecutive parts; "
    "softmax(q k / sqrt(head size)) v over the present and earlier steps, then out",
    "moe: the slices e of the stacks router, up and down are experts; if only one has logit_offset > -inf, the "
    "output of expert 0; otherwise, of such experts e whose group_E is group_K[task] (all, without a task), the "
    "student.top_k greatest router[e] . x + logit_offset[e]; their softmax weights the outputs "
    "gelu(x up[e]^T) down[e]",
    "gelu(x) = x (1 + erf(x / sqrt 2)) / 2; linear maps are weight x + bias, where there is a bias",
    "action = the first action_size numbers of head(norm(x[last])), clipped to [-action_clip, action_clip]",
)

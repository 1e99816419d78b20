"Answers to the exercises of lesson 4, as other people may write them."
import math

import numpy as np
import torch

from nanochat.lab.exercises import optimizers as course


# 4.1

def adam_in_numpy(param, grad, mean, square, step, lr, beta1, beta2, eps):
    p, g, m, v = (np.asarray(t, dtype=np.float64) for t in (param, grad, mean, square))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * np.square(g)
    return p - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps), m, v


def adam_with_lerp_as_a_list(param, grad, mean, square, step, lr, beta1, beta2, eps):
    mean = torch.lerp(mean, grad, 1 - beta1)
    square = square.lerp(grad * grad, 1 - beta2)
    correction = math.sqrt(1 - beta2**step)
    return [param - lr / (1 - beta1**step) * mean * correction / (square.sqrt() + eps * correction), mean, square]


def adam_element_by_element(param, grad, mean, square, step, lr, beta1, beta2, eps):
    new = [torch.empty_like(param) for _ in range(3)]
    for i in range(param.shape[0]):
        for j in range(param.shape[1]):
            g = grad[i, j].item()
            m = beta1 * mean[i, j].item() + (1 - beta1) * g
            v = beta2 * square[i, j].item() + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            for tensor, number in zip(new, (param[i, j].item() - lr * m_hat / (v_hat**0.5 + eps), m, v)): tensor[i, j] = number
    return tuple(new)


def adam_in_place_on_clones(param, grad, mean, square, step, lr, beta1, beta2, eps):
    param, mean, square = param.clone(), mean.clone(), square.clone()
    mean *= beta1
    mean += (1 - beta1) * grad
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    param.addcdiv_(mean / (1 - beta1**step), (square / (1 - beta2**step)).sqrt_().add_(eps), value=-lr)
    return param, mean, square


def adam_in_double_by_a_generator(*case):
    param, grad, mean, square, step, lr, beta1, beta2, eps = case
    mean = beta1 * mean.double() + (1 - beta1) * grad.double()
    square = beta2 * square.double() + (1 - beta2) * grad.double()**2
    return (t for t in (param - lr * mean / (1 - beta1**step) / (torch.sqrt(square / (1 - beta2**step)) + eps), mean, square))


def adam_as_lists(*case): return [t.tolist() for t in adam_in_place_on_clones(*case)]


def adam_uncorrected(param, grad, mean, square, step, lr, beta1, beta2, eps):
    mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
    return param - lr * mean / (square.sqrt() + eps), mean, square


def adam_counts_from_zero(param, grad, mean, square, step, *rest):
    return adam_in_place_on_clones(param, grad, mean, square, step + 1, *rest)


def adam_swaps_betas(param, grad, mean, square, step, lr, beta1, beta2, eps):
    return adam_in_place_on_clones(param, grad, mean, square, step, lr, beta2, beta1, eps)


def adam_writes_into_the_mean(param, grad, mean, square, step, lr, beta1, beta2, eps):
    mean.mul_(beta1).add_((1 - beta1) * grad)
    square = beta2 * square + (1 - beta2) * grad**2
    return param - lr * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps), mean, square


def adam_with_decay_in_the_step(*case):
    param, *means = adam_in_place_on_clones(*case)
    return param - 0.01 * case[0], *means


def adam_returns_the_parameters(*case): return adam_in_place_on_clones(*case)[0]


# 4.2

def predicted_by_a_loop():
    weight = other = 1.0
    for _ in range(20):
        weight *= 1 - 0.01 * 0.1
        other -= 0.01
    return weight, other


def predicted_as_an_array(): return np.array([0.98, 0.80], dtype=np.float32)


def predicted_by_torch():
    ends = []
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = kind([weight], lr=0.01, weight_decay=0.1)
        for _ in range(20):
            weight.grad = torch.zeros(1)
            optimizer.step()
        ends.append(weight.detach())
    return torch.cat(ends)


def predicted_as_tensors(): return [torch.tensor(math.exp(-0.02)), torch.tensor([0.8])]


def predicted_the_same(): return 0.98, 0.98
def predicted_the_wrong_way_round(): return 0.8, 0.98
def predicted_decay_without_the_rate(): return 0.9**20, 0.8
def predicted_no_decay(): return [1.0, 0.8]


# 4.3

def schulz_in_numpy(G, steps):
    X = np.asarray(G) / np.linalg.norm(np.asarray(G))
    for _ in range(int(steps)): X = 1.5 * X - 0.5 * X @ X.T @ X
    return X


def schulz_by_recursion(G, steps):
    if steps == 0: return torch.divide(G, torch.sqrt((G * G).sum()))
    X = schulz_by_recursion(G, steps - 1)
    return torch.matmul(1.5 * torch.eye(len(X)) - 0.5 * torch.matmul(X, X.transpose(0, 1)), X)


def schulz_on_the_other_side(G, steps):
    X = G.double().clone()
    X /= X.norm() + 1e-7
    for _ in range(steps): X += 0.5 * (X - X @ (X.T @ X))
    return X


def schulz_by_singular_values(G, steps):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S /= S.norm()
    for _ in range(steps): S = S * (3 - S**2) / 2
    return U * S @ Vh


def schulz_in_lists(G, steps):
    X = (G / G.norm()).tolist()
    def times(A, B): return [[sum(a * b for a, b in zip(row, column)) for column in zip(*B)] for row in A]
    for _ in range(steps):
        cube = times(times(X, list(zip(*X))), X)
        X = [[1.5 * x - 0.5 * c for x, c in zip(*rows)] for rows in zip(X, cube)]
    return X


def schulz_unnormalized(G, steps):
    for _ in range(steps): G = 1.5 * G - 0.5 * G @ G.mT @ G
    return G


def schulz_by_the_spectral_norm(G, steps):
    X = G / torch.linalg.matrix_norm(G, 2)
    for _ in range(steps): X = 1.5 * X - 0.5 * X @ X.mT @ X
    return X


def schulz_with_a_slope(G, steps): # a + b = 1, but not flat
    X = G / G.norm()
    for _ in range(steps): X = 2 * X - X @ X.mT @ X
    return X


def schulz_elementwise(G, steps):
    X = G / G.norm()
    for _ in range(steps): X = 1.5 * X - 0.5 * X**3
    return X


def schulz_exact(G, steps):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


# 4.4

def schedule_by_cases(step, steps, warmup_steps, warmdown_ratio, final):
    down = round(warmdown_ratio * steps)
    up = 1.0
    if warmup_steps > 0 and step < warmup_steps: up = (step + 1) / warmup_steps
    if steps - step >= down: return up
    share = (steps - step) / down
    fall = share * 1.0 + (1 - share) * final
    return up if up < fall else fall


def schedule_by_interp(step, steps, warmup_steps, warmdown_ratio, final):
    fall = np.interp(step, [steps - round(warmdown_ratio * steps), steps], [1.0, final])
    return np.minimum(fall, (step + 1) / max(warmup_steps, 1))


def schedule_in_torch(step, steps, warmup_steps, warmdown_ratio, final):
    left = torch.tensor((steps - step) / (round(warmdown_ratio * steps) or 1)).clamp(max=1)
    climb = torch.tensor((step + 1) / (warmup_steps or 1))
    return torch.stack([torch.lerp(torch.tensor(float(final)), torch.tensor(1.0), left), climb, torch.ones(())]).min()


schedule_as_a_lambda = lambda i, n, up, ratio, end: np.float32(min(1, (i + 1) / up if up else 1, end + (1 - end) * min(1, (n - i) / max(1, round(ratio * n)))))


def schedule_as_an_array(*case): return np.array([schedule_by_cases(*case)])


def schedule_from_zero(step, steps, warmup_steps, *rest): return min(step / warmup_steps if warmup_steps else 1, schedule_by_cases(step, steps, 0, *rest))
def schedule_to_the_last_step(step, steps, *rest): return schedule_by_cases(step + 1 if step > steps // 2 else step, steps, *rest)
def schedule_falls_to_zero(step, steps, warmup_steps, warmdown_ratio, final): return schedule_by_cases(step, steps, warmup_steps, warmdown_ratio, 0)
def schedule_as_a_product(step, steps, warmup_steps, warmdown_ratio, final): return schedule_by_cases(step, steps, 0, warmdown_ratio, final) * schedule_by_cases(step, steps, warmup_steps, 1e-9, 1)
def schedule_of_a_cosine(*case): return (1 - math.cos(math.pi * schedule_by_cases(*case))) / 2
def schedule_rounded_down(step, steps, warmup_steps, ratio, final): return schedule_by_cases(step, steps, warmup_steps, int(ratio * steps) / steps, final)
def schedule_rounded_up(step, steps, warmup_steps, ratio, final): return schedule_by_cases(step, steps, warmup_steps, math.ceil(ratio * steps) / steps, final)
def schedule_not_rounded(step, steps, up, ratio, final): return min(1, (step + 1) / up if up else 1, final + (1 - final) * (steps - step) / (ratio * steps or 1))
def schedule_above_one(step, steps, warmup_steps, *rest): return max(schedule_by_cases(step, steps, warmup_steps, *rest), (step + 1) / max(1, warmup_steps))


# 4.5

class OptimizerByNames:
    "Sorts by name, keeps its state in dicts, and replaces `.data`."
    def __init__(self, model, matrix_lr=0.02, embedding_lr=0.2, head_lr=0.004, weight_decay=0.1):
        self.params, self.state, self.t, self.decay = dict(model.named_parameters()), {}, 0, weight_decay
        scale = math.sqrt(768 / model.wte.embedding_dim)
        self.lr = {name: matrix_lr if name.startswith("blocks.") else scale * (head_lr if "head" in name else embedding_lr) for name in self.params}

    def zero_grad(self):
        for p in self.params.values(): p.grad = None

    def step(self, multiplier=1.0):
        self.t += 1
        for name, p in self.params.items():
            lr, g = multiplier * self.lr[name], p.grad.detach()
            if name.startswith("blocks."):
                buffer = self.state[name] = 0.95 * self.state.get(name, 0) + g
                G = g + 0.95 * buffer
                if G.norm() > 0: G = course.newton_schulz(G, 16)
                lr *= max(1, G.size(0) / G.size(1))**0.5
                p.data = p.data * (1 - lr * self.decay) - lr * G
            else:
                mean, square = self.state.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
                p.data, *self.state[name] = course.adam_step(p.data, g, mean, square, self.t, lr, 0.8, 0.98, 1e-10)


class OptimizerOfTorch(torch.optim.Optimizer):
    "Subclasses torch's own class."
    def __init__(self, model, matrix_lr=0.02, embedding_lr=0.2, head_lr=0.004, weight_decay=0.1):
        wide = (768 / model.wte.weight.size(1))**0.5
        blocks = [p for block in model.blocks for p in block.parameters()]
        super().__init__([{"params": blocks, "lr": matrix_lr, "muon": True}, {"params": model.wte.parameters(), "lr": embedding_lr * wide, "muon": False},
                          {"params": model.lm_head.parameters(), "lr": head_lr * wide, "muon": False}], {"wd": weight_decay})

    @torch.no_grad()
    def step(self, multiplier=1.0):
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                s["t"] = s.get("t", 0) + 1
                mean, square = s.get("mean", torch.zeros_like(p)), s.get("square", torch.zeros_like(p))
                if group["muon"]:
                    s["mean"] = mean.lerp(p.grad, 0.05)
                    update = p.grad.lerp(s["mean"], 0.95)
                    update = course.newton_schulz(update + 0, 16) # a matrix of zeros stays one
                    lr = group["lr"] * multiplier * max(1.0, p.size(0) / p.size(1))**0.5
                    p.mul_(1 - lr * group["wd"]).add_(update, alpha=-lr)
                else:
                    new, s["mean"], s["square"] = course.adam_step(p, p.grad, mean, square, s["t"], group["lr"] * multiplier, 0.8, 0.98, 1e-10)
                    p.copy_(new)


class OptimizerOfLayers:
    "Walks over the layers and calls plain functions."
    def __init__(self, model, matrix_lr=0.02, embedding_lr=0.2, head_lr=0.004, weight_decay=0.1):
        self.model, self.rates, self.decay, self.calls = model, (matrix_lr, embedding_lr, head_lr), weight_decay, 0
        self.memory = {id(p): [np.zeros(p.shape, np.float32) for _ in range(2)] for p in model.parameters()}

    def step(self, multiplier=1.0):
        self.calls += 1
        matrix_lr, *table_lrs = [rate * multiplier for rate in self.rates]
        for block in self.model.blocks:
            for layer in (*block.attn.children(), *block.mlp.children()): self._muon(layer.weight, matrix_lr)
        for layer, lr in zip((self.model.wte, self.model.lm_head), table_lrs): self._adam(layer.weight, lr * math.sqrt(768 / layer.weight.shape[1]))

    def _muon(self, p, lr):
        memory, grad = self.memory[id(p)], p.grad.numpy()
        memory[0] = 0.95 * memory[0] + 0.05 * grad
        update = 0.05 * grad + 0.95 * memory[0]
        if np.any(update): update = schulz_in_numpy(update, 16)
        lr *= np.sqrt(max(1, p.shape[0] / p.shape[1]))
        p.data -= torch.from_numpy(np.asarray(lr * (update + self.decay * p.detach().numpy()), np.float32))

    def _adam(self, p, lr):
        new, *self.memory[id(p)] = adam_in_numpy(p.detach(), p.grad, *self.memory[id(p)], self.calls, lr, 0.8, 0.98, 1e-10)
        p.data.copy_(torch.from_numpy(new))

    def zero_grad(self):
        for p in self.model.parameters(): p.grad = None


class OptimizerThatKeepsZeros(course.Optimizer):
    def zero_grad(self):
        for p in self.matrices + self.tables:
            if p.grad is not None: p.grad.zero_()


class OptimizerThatSkipsZeros(course.Optimizer): # and the decay
    def muon(self, matrix, momentum, lr):
        if matrix.grad.any() or momentum.any(): super().muon(matrix, momentum, lr)


class OptimizerWithoutNesterov(course.Optimizer):
    def muon(self, matrix, momentum, lr):
        momentum.mul_(0.95).add_(0.05 * matrix.grad)
        update = course.newton_schulz(momentum, 16)
        lr = lr * max(1, matrix.shape[0] / matrix.shape[1])**0.5
        matrix -= lr * (update + self.weight_decay * matrix)


class OptimizerWithoutScale(course.Optimizer):
    def muon(self, matrix, momentum, lr):
        momentum.mul_(0.95).add_(0.05 * matrix.grad)
        update = course.newton_schulz(0.05 * matrix.grad + 0.95 * momentum, 16)
        matrix -= lr * (update + self.weight_decay * matrix)


class OptimizerThatAscends(course.Optimizer):
    def muon(self, matrix, momentum, lr): super().muon(matrix, momentum, -lr)


class OptimizerDeafToItsMultiplier(course.Optimizer):
    def step(self, multiplier=1.0): super().step(1.0)


class OptimizerWithL2(course.Optimizer): # decay inside the gradient
    def muon(self, matrix, momentum, lr):
        momentum.mul_(0.95).add_(0.05 * (matrix.grad + self.weight_decay * matrix))
        update = course.newton_schulz(0.05 * matrix.grad + 0.95 * momentum, 16)
        matrix -= lr * max(1, matrix.shape[0] / matrix.shape[1])**0.5 * update


class OptimizerThatKeepsGradients(course.Optimizer):
    def zero_grad(self): return None


class OptimizerOfEverythingByMuon(course.Optimizer): # the tables, too
    def __init__(self, model, *rates, **more):
        super().__init__(model, *rates, **more)
        self.matrices = list(model.parameters())
        self.momenta, self.tables = [torch.zeros_like(p) for p in self.matrices], []


RIGHT = {
    "4.1": [adam_in_numpy, adam_with_lerp_as_a_list, adam_element_by_element, adam_in_place_on_clones, adam_in_double_by_a_generator, adam_as_lists],
    "4.2": [predicted_by_a_loop, predicted_as_an_array, predicted_by_torch, predicted_as_tensors],
    "4.3": [schulz_in_numpy, schulz_by_recursion, schulz_on_the_other_side, schulz_by_singular_values, schulz_in_lists],
    "4.4": [schedule_by_cases, schedule_by_interp, schedule_in_torch, schedule_as_a_lambda, schedule_as_an_array],
    "4.5": [OptimizerThatKeepsZeros, OptimizerByNames, OptimizerOfTorch, OptimizerOfLayers],
}
WRONG = {
    "4.1": [(adam_uncorrected, "1 − beta"), (adam_counts_from_zero, "1 − beta"), (adam_swaps_betas, "mean of the gradients"), (adam_writes_into_the_mean, "writes into"),
            (adam_with_decay_in_the_step, "parameters"), (adam_returns_the_parameters, "three things")],
    "4.2": [(predicted_the_same, "gradient's size"), (predicted_the_wrong_way_round, "multiplies the weight"), (predicted_decay_without_the_rate, "multiplies the weight"),
            (predicted_no_decay, "multiplies the weight")],
    "4.3": [(schulz_unnormalized, "divided by its norm"), (schulz_by_the_spectral_norm, "divided by its norm"), (schulz_with_a_slope, "1.5 X"), (schulz_elementwise, "matrix products"),
            (schulz_exact, "No step")],
    "4.4": [(schedule_from_zero, "wasted"), (schedule_to_the_last_step, "one step short"), (schedule_falls_to_zero, "not below"), (schedule_as_a_product, "lower one"),
            (schedule_of_a_cosine, "step"), (schedule_above_one, "last step"), (schedule_rounded_down, "7 here"), (schedule_rounded_up, "3 here"), (schedule_not_rounded, "7 here")],
    "4.5": [(OptimizerWithoutNesterov, "Nesterov"), (OptimizerWithoutScale, "√(rows/cols)"), (OptimizerThatAscends, "newton_schulz"), (OptimizerDeafToItsMultiplier, "multiplier"),
            (OptimizerWithL2, "Decay subtracts"), (OptimizerThatKeepsGradients, "still has a gradient"), (OptimizerOfEverythingByMuon, "768"), (OptimizerThatSkipsZeros, "still decays")],
}

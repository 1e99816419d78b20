"Answers to the exercises of lesson 0: right ones in many styles, and plausible wrong ones."
import copy
import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F


# 0.1 · Slopes by small steps

def slopes_in_lists(f, numbers, h=1e-4):
    def moved(i, by): return [n + by if j == i else n for j, n in enumerate(numbers)]
    return [(f(moved(i, h)) - f(moved(i, -h))) / (2 * h) for i in range(len(numbers))]


def slopes_in_numpy(f, numbers, h=1e-4):
    at = np.array(numbers, dtype=float)
    return np.array([(f(at + step) - f(at - step)) / (2 * h) for step in h * np.eye(len(at))])


def slopes_as_a_tensor(f, numbers, h=1e-4):
    at, result = torch.tensor(numbers, dtype=torch.float64), torch.zeros(len(numbers), dtype=torch.float64)
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = h
        result[i] = (f((at + step).tolist()) - f((at - step).tolist())) / (2 * h)
    return result


def slopes_from_a_generator(f, numbers, h=1e-4):
    for i in range(len(numbers)):
        up, down = list(numbers), list(numbers)
        up[i] += h
        down[i] -= h
        yield np.float64((f(up) - f(down)) / (2 * h))


def slopes_from_five_points(f, numbers, h=1e-3): # a better formula than the one of the text
    def at(i, by): return f([*numbers[:i], numbers[i] + by, *numbers[i + 1:]])
    return tuple((8 * (at(i, h) - at(i, -h)) - at(i, 2 * h) + at(i, -2 * h)) / (12 * h) for i in range(len(numbers)))


def slopes_put_back_in_place(f, numbers, h=1e-4):
    numbers, result = copy.copy(numbers), []
    for i, kept in enumerate(numbers):
        numbers[i] = kept + h
        high = f(numbers)
        numbers[i] = kept - h
        low = f(numbers)
        numbers[i] = kept
        result.append((high - low) / h / 2)
    return result


def slopes_to_one_side(f, numbers, h=1e-4):
    now = f(numbers)
    return [(f([*numbers[:i], n + h, *numbers[i + 1:]]) - now) / h for i, n in enumerate(numbers)]


def slopes_all_moved_at_once(f, numbers, h=1e-4):
    slope = (f([n + h for n in numbers]) - f([n - h for n in numbers])) / (2 * h)
    return [slope for _ in numbers]


def slopes_of_the_list_itself(f, numbers, h=1e-4):
    result = []
    for i in range(len(numbers)):
        numbers[i] += h
        high = f(numbers)
        numbers[i] -= 2 * h
        result.append((high - f(numbers)) / (2 * h))
    return result


def slopes_divided_by_h(f, numbers, h=1e-4):
    return [2 * slope for slope in slopes_in_lists(f, numbers, h)]


def slopes_summed(f, numbers, h=1e-4):
    return sum(slopes_in_lists(f, numbers, h))


# 0.2 · A number that remembers

class _Given:
    def __init__(self, data, parents=(), slopes=()):
        self.data, self.grad = data, 0.0
        self.parents, self.slopes = parents, slopes
    def __neg__(self): return self * -1
    def __sub__(self, other): return self + -other
    def __truediv__(self, other): return self * other**-1
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __rsub__(self, other): return -self + other


class Number(_Given): # lists, and a helper that wraps plain numbers
    def wrap(self, other): return other if isinstance(other, Number) else Number(other)
    def __add__(self, other):
        other = self.wrap(other)
        return Number(self.data + other.data, [self, other], [1, 1])
    def __mul__(self, other):
        other = self.wrap(other)
        return Number(self.data * other.data, [self, other], [other.data, self.data])
    def __pow__(self, n): return Number(self.data**n, [self], [n * self.data**(n - 1)])
    def exp(self): return Number(math.exp(self.data), [self], [math.exp(self.data)])
    def log(self): return Number(math.log(self.data), [self], [1 / self.data])


class NumpyNumber(_Given): # numpy's functions and numbers
    def __add__(self, other):
        if not hasattr(other, "data") or isinstance(other, (np.generic, np.ndarray)): other = NumpyNumber(np.float64(other))
        return NumpyNumber(np.add(self.data, other.data), (self, other), np.ones(2))
    def __mul__(self, other):
        if not isinstance(other, NumpyNumber): other = NumpyNumber(np.float64(other))
        return NumpyNumber(np.multiply(self.data, other.data), (self, other), np.array([other.data, self.data]))
    def __pow__(self, n): return NumpyNumber(np.power(float(self.data), n), (self,), (n * np.power(float(self.data), n - 1),))
    def exp(self):
        e = np.exp(self.data)
        return NumpyNumber(e, (self,), (e,))
    def log(self): return NumpyNumber(np.log(self.data), (self,), (np.reciprocal(np.float64(self.data)),))


class OneParent(_Given): # plain numbers are no parents
    def __add__(self, other):
        if isinstance(other, OneParent): return OneParent(self.data + other.data, (self, other), (1.0, 1.0))
        return OneParent(self.data + other, (self,), (1.0,))
    def __mul__(self, other):
        if isinstance(other, OneParent): return OneParent(self.data * other.data, (self, other), (other.data, self.data))
        return OneParent(self.data * other, (self,), (other,))
    def __pow__(self, n): return OneParent(self.data**n, (self,), (n * self.data**n / self.data,))
    def exp(self): return OneParent(math.e**self.data, (self,), (math.e**self.data,))
    def log(self): return OneParent(math.log(self.data), (self,), (self.data**-1,))


class TensorNumber(_Given): # data are tensors, slopes too
    def make(self, data, parents, slopes): return type(self)(data, parents, slopes)
    def other(self, other): return other if isinstance(other, _Given) else type(self)(other)
    def __add__(self, other):
        other = self.other(other)
        return self.make(torch.tensor(float(self.data + other.data), dtype=torch.float64), (self, other), (torch.tensor(1.0), torch.tensor(1.0)))
    def __mul__(self, other):
        other = self.other(other)
        return self.make(self.data * other.data, (self, other), (torch.tensor(float(other.data)), torch.tensor(float(self.data))))
    def __pow__(self, n): return self.make(self.data**n, (self,), (torch.tensor(float(n * self.data**(n - 1))),))
    def exp(self):
        e = torch.tensor(float(self.data), dtype=torch.float64).exp()
        return self.make(e, (self,), (e,))
    def log(self): return self.make(torch.tensor(float(self.data), dtype=torch.float64).log(), (self,), (1 / self.data,))


class SlopesExchanged(Number):
    def __mul__(self, other):
        other = self.wrap(other)
        return Number(self.data * other.data, [self, other], [self.data, other.data])


class PowerWithoutItsFactor(Number):
    def __pow__(self, n): return Number(self.data**n, [self], [self.data**(n - 1)])


class LogarithmOfBaseTen(Number):
    def log(self): return Number(math.log10(self.data), [self], [1 / self.data])


class SlopesAreValues(Number):
    def __mul__(self, other):
        other = self.wrap(other)
        return Number(self.data * other.data, [self, other], [other, self])


class AddsInPlace(Number):
    def __add__(self, other):
        self.data += self.wrap(other).data
        return self


class ExpWithoutMemory(Number):
    def exp(self): return Number(math.exp(self.data))


class NothingReturned(Number):
    def __pow__(self, n): Number(self.data**n, [self], [n * self.data**(n - 1)])


class OneSlopeForTwo(Number):
    def __add__(self, other):
        other = self.wrap(other)
        return Number(self.data + other.data, [self, other], [1])


# 0.3 · Backward

def backward_recursive(end):
    order, seen = [], set()
    def visit(value):
        if value not in seen:
            seen.add(value)
            for parent in value.parents: visit(parent)
            order.append(value)
    visit(end)
    end.grad = 1.0
    while order:
        value = order.pop()
        for parent, slope in zip(value.parents, value.slopes): parent.grad += slope * value.grad


def backward_with_a_stack(end): # depth first without recursion
    order, seen, stack = [], set(), [(end, False)]
    while stack:
        value, done = stack.pop()
        if done: order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            stack += [(parent, False) for parent in value.parents]
    end.grad = 1
    for value in order[::-1]:
        for i in range(len(value.parents)): value.parents[i].grad = value.parents[i].grad + value.slopes[i] * value.grad


def backward_counting_users(end): # Kahn's order: a value is ready when all its users are done
    users, found = {end: 0}, deque([end])
    while found:
        for parent in found.popleft().parents:
            if parent not in users: found.append(parent)
            users[parent] = users.get(parent, 0) + 1
    end.grad, ready = np.float64(1), [end]
    while ready:
        value = ready.pop()
        for parent, slope in zip(value.parents, value.slopes):
            parent.grad += slope * value.grad
            users[parent] -= 1
            if not users[parent]: ready.append(parent)


def backward_that_clears_first(end):
    order = []
    def visit(value):
        if any(value is other for other in order): return
        for parent in value.parents: visit(parent)
        order.append(value)
    visit(end)
    for value in order: value.grad = 0.0
    end.grad = torch.tensor(1.0, dtype=torch.float64)
    for value in reversed(order):
        for parent, slope in zip(value.parents, value.slopes): parent.grad += value.grad * slope
    return end


def backward_by_depth(end): # sorted by the longest way to the end
    depth, waiting = {end: 0}, [end]
    while waiting:
        value = waiting.pop()
        for parent in value.parents:
            if depth.get(parent, -1) < depth[value] + 1:
                depth[parent] = depth[value] + 1
                waiting.append(parent)
    end.grad = 1.0
    for value in sorted(depth, key=depth.get):
        for parent, slope in zip(value.parents, value.slopes): parent.grad += slope * value.grad


def backward_along_every_path(end, gradient=1.0):
    end.grad += gradient
    for parent, slope in zip(end.parents, end.slopes): backward_along_every_path(parent, slope * gradient)


def backward_that_overwrites(end):
    order, seen = [], set()
    def visit(value):
        if value in seen: return
        seen.add(value)
        for parent in value.parents: visit(parent)
        order.append(value)
    visit(end)
    end.grad = 1.0
    for value in reversed(order):
        for parent, slope in zip(value.parents, value.slopes): parent.grad = slope * value.grad


def backward_too_early(end):
    end.grad, waiting, seen = 1.0, [end], {end}
    while waiting:
        value = waiting.pop(0)
        for parent, slope in zip(value.parents, value.slopes):
            parent.grad += slope * value.grad
            if parent not in seen: waiting.append(parent)
            seen.add(parent)


def backward_from_zero(end):
    order, seen = [], set()
    def visit(value):
        if value in seen: return
        seen.add(value)
        for parent in value.parents: visit(parent)
        order.append(value)
    visit(end)
    for value in reversed(order):
        for parent, slope in zip(value.parents, value.slopes): parent.grad += slope * value.grad


def backward_that_adds_slopes(end):
    order, seen = [], set()
    def visit(value):
        if value in seen: return
        seen.add(value)
        for parent in value.parents: visit(parent)
        order.append(value)
    visit(end)
    end.grad = 1.0
    for value in reversed(order):
        for parent, slope in zip(value.parents, value.slopes): parent.grad += slope + value.grad


def backward_parents_only(end):
    end.grad = 1.0
    for parent, slope in zip(end.parents, end.slopes): parent.grad += slope


# 0.4 · Backward through the head

def head_in_torch(x, W, targets):
    logits = x @ W.T
    logp = logits.log_softmax(-1)
    d = logp.exp() - F.one_hot(targets, len(W))
    d /= len(x)
    return F.nll_loss(logp, targets), d @ W, d.mT @ x


def head_in_numpy(x, W, targets):
    x, W, targets = x.numpy(), W.numpy(), targets.numpy()
    z = x @ W.T
    z -= z.max(axis=1, keepdims=True)
    p = np.exp(z)
    p /= p.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), targets])
    p[np.arange(len(z)), targets] -= 1
    return [loss, p @ W / len(x), p.T @ x / len(x)]


def head_in_loops(x, W, targets):
    N, (V, C) = len(x), W.shape
    loss, dx, dW = 0.0, [[0.0] * C for _ in range(N)], [[0.0] * C for _ in range(V)]
    for n in range(N):
        z = [sum(float(x[n, c]) * float(W[v, c]) for c in range(C)) for v in range(V)]
        top = max(z)
        e = [math.exp(one - top) for one in z]
        total = sum(e)
        target = int(targets[n])
        loss += (math.log(total) + top - z[target]) / N
        for v in range(V):
            d = (e[v] / total - (v == target)) / N
            for c in range(C):
                dx[n][c] += d * float(W[v, c])
                dW[v][c] += d * float(x[n, c])
    return loss, dx, dW


def head_in_einsum_and_double(x, W, targets):
    x, W = x.double(), W.double()
    z = torch.einsum("nc,vc->nv", x, W)
    loss = (z.logsumexp(1) - z.gather(1, targets[:, None])[:, 0]).mean()
    d = z.softmax(1).scatter_add(1, targets[:, None], torch.full((len(x), 1), -1.0, dtype=torch.float64)) / len(x)
    return loss.item(), torch.einsum("nv,vc->nc", d, W), torch.einsum("nv,nc->vc", d, x)


def head_token_by_token(x, W, targets):
    loss, dx, dW = torch.zeros(()), [], torch.zeros_like(W)
    for row, target in zip(x, targets):
        logp = (W @ row).log_softmax(0)
        d = logp.exp()
        d[target] -= 1
        loss -= logp[target] / len(x)
        dx.append(d @ W / len(x))
        dW += torch.outer(d, row) / len(x)
    yield from (loss, torch.stack(dx), dW)


def head_without_the_mean(x, W, targets):
    loss, dx, dW = head_in_torch(x, W, targets)
    return loss, dx * len(x), dW * len(x)


def head_with_the_wrong_sign(x, W, targets):
    loss, dx, dW = head_in_torch(x, W, targets)
    return loss, -dx, -dW


def head_that_overflows(x, W, targets):
    e = (x @ W.T).exp()
    p = e / e.sum(1, keepdim=True)
    d = (p - F.one_hot(targets, len(W))) / len(x)
    return -p[torch.arange(len(x)), targets].log().mean(), d @ W, d.T @ x


def head_without_the_target(x, W, targets):
    loss, *_ = head_in_torch(x, W, targets)
    p = (x @ W.T).softmax(1) / len(x)
    return loss, p @ W, p.T @ x


def head_with_a_sum(x, W, targets):
    loss, dx, dW = head_in_torch(x, W, targets)
    return loss * len(x), dx, dW


def head_with_one_exchanged(x, W, targets):
    loss, dx, dW = head_in_torch(x, W, targets)
    return loss, dW, dx


# 0.5 · Learn the table

def learn_by_autograd(first, second, n, steps, rate):
    table, losses = torch.zeros(n, n, requires_grad=True), []
    for _ in range(steps):
        table.grad = None
        loss = F.cross_entropy(table[first], second)
        loss.backward()
        with torch.no_grad(): table -= rate * table.grad
        losses.append(loss)
    return table, losses


def learn_with_sgd(first, second, n, steps, rate):
    table = torch.nn.Parameter(torch.zeros(n, n))
    optimizer, losses = torch.optim.SGD([table], lr=rate), torch.zeros(steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.nll_loss(table.log_softmax(1)[first], second)
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    return [table.data, losses]


def learn_in_numpy_by_counts(first, second, n, steps, rate):
    first, second = first.numpy(), second.numpy()
    counts = np.zeros((n, n))
    np.add.at(counts, (first, second), 1)
    table, losses = np.zeros((n, n)), []
    for _ in range(steps):
        p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
        losses.append(-(counts * np.log(p)).sum() / len(first))
        table -= rate * (counts.sum(1, keepdims=True) * p - counts) / len(first)
    return table, np.array(losses)


def learn_pair_by_pair(first, second, n, steps, rate):
    table, losses = [[0.0] * n for _ in range(n)], []
    pairs = list(zip(first.tolist(), second.tolist()))
    for _ in range(steps):
        gradient, loss = [[0.0] * n for _ in range(n)], 0.0
        for a, b in pairs:
            e = [math.exp(z) for z in table[a]]
            loss -= math.log(e[b] / sum(e)) / len(pairs)
            for c in range(n): gradient[a][c] += (e[c] / sum(e) - (c == b)) / len(pairs)
        table = [[z - rate * g for z, g in zip(*rows)] for rows in zip(table, gradient)]
        losses.append(loss)
    return table, tuple(losses)


def learn_with_grad_and_one_hot(first, second, n, steps, rate):
    one_hot, table, losses = F.one_hot(first, n).double(), torch.zeros(n, n, dtype=torch.float64), []
    for _ in range(steps):
        table.requires_grad_()
        loss = F.cross_entropy(one_hot @ table, second)
        gradient, = torch.autograd.grad(loss, table)
        table = table.detach() - rate * gradient
        losses += [np.float32(loss.item())]
    return table, losses


def learn_with_gradients_piling_up(first, second, n, steps, rate):
    table, losses = torch.zeros(n, n, requires_grad=True), []
    for _ in range(steps):
        loss = F.cross_entropy(table[first], second)
        loss.backward()
        with torch.no_grad(): table -= rate * table.grad
        losses.append(loss.item())
    return table, losses


def learn_uphill(first, second, n, steps, rate): return learn_by_autograd(first, second, n, steps, -rate)


def learn_with_losses_after_the_step(first, second, n, steps, rate):
    table, losses = learn_by_autograd(first, second, n, steps + 1, rate)
    return table, losses[1:]


def learn_from_a_random_table(first, second, n, steps, rate):
    table, losses = torch.randn(n, n, generator=torch.Generator().manual_seed(0)), []
    for _ in range(steps):
        table.requires_grad_()
        loss = F.cross_entropy(table[first], second)
        table = (table - rate * torch.autograd.grad(loss, table)[0]).detach()
        losses.append(loss.item())
    return table, losses


def learn_with_a_sum(first, second, n, steps, rate): return learn_by_autograd(first, second, n, steps, rate * len(first))


def learn_the_losses_only(first, second, n, steps, rate): return learn_by_autograd(first, second, n, steps, rate)[1]


def learn_probabilities(first, second, n, steps, rate):
    table, losses = learn_by_autograd(first, second, n, steps, rate)
    return table.softmax(1), losses


def learn_the_second_from_the_first(first, second, n, steps, rate): return learn_by_autograd(second, first, n, steps, rate)


RIGHT = {
    "0.1": [slopes_from_five_points, slopes_in_lists, slopes_in_numpy, slopes_as_a_tensor, slopes_from_a_generator,
            slopes_put_back_in_place],
    "0.2": [Number, NumpyNumber, OneParent, TensorNumber],
    "0.3": [backward_recursive, backward_with_a_stack, backward_counting_users,
            backward_that_clears_first, backward_by_depth],
    "0.4": [head_in_torch, head_in_numpy, head_in_loops, head_in_einsum_and_double, head_token_by_token],
    "0.5": [learn_by_autograd, learn_with_sgd, learn_in_numpy_by_counts, learn_pair_by_pair,
            learn_with_grad_and_one_hot],
}

WRONG = {
    "0.1": [(slopes_to_one_side, "both sides"), (slopes_all_moved_at_once, "at once"),
            (slopes_of_the_list_itself, "copy"), (slopes_divided_by_h, "2h"), (slopes_summed, "shape")],
    "0.2": [(SlopesExchanged, "by a is b"), (PowerWithoutItsFactor, "n * a**(n - 1)"),
            (LogarithmOfBaseTen, "a.log()"), (SlopesAreValues, "a number is expected"),
            (AddsInPlace, "changes one of its numbers"), (ExpWithoutMemory, "own slope"),
            (NothingReturned, "return"), (OneSlopeForTwo, "one slope for each parent")],
    "0.3": [(backward_along_every_path, "every path"), (backward_that_overwrites, "add up"),
            (backward_too_early, "complete"), (backward_from_zero, "so it is 1"),
            (backward_that_adds_slopes, "multiply"), (backward_parents_only, "multiply")],
    "0.4": [(head_without_the_mean, "too large"), (head_with_the_wrong_sign, "wrong sign"),
            (head_that_overflows, "maximum"), (head_without_the_target, "one-hot"),
            (head_with_a_sum, "mean over the tokens"), (head_with_one_exchanged, "shape")],
    "0.5": [(learn_with_gradients_piling_up, "pile up"), (learn_uphill, "against the gradient"),
            (learn_with_losses_after_the_step, "before the first step"),
            (learn_from_a_random_table, "zeros"), (learn_with_a_sum, "mean over all pairs"),
            (learn_the_losses_only, "two things"), (learn_probabilities, "table"),
            (learn_the_second_from_the_first, "losses")],
}

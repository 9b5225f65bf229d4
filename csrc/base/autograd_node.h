// Nodes of the autograd graph. torch::autograd::Function makes one from two static functions, but takes as
// long for it as a small kernel: its context is a map by name.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace bigramx {

// A node whose gradients go to `inputs`, some of which may be undefined. torch counts references to nodes
// inside them or, up to 2.12, beside them.
template <typename Node, typename... Inputs>
auto make_node(const Inputs&... inputs) {
    using Base = torch::autograd::Node;
    using Shared = std::shared_ptr<Base>;
    using Pointer = decltype(torch::autograd::Edge::function);
    constexpr bool is_shared = std::is_same_v<Pointer, Shared>;
    auto node = [] {
        if constexpr (is_shared) {
            return std::make_shared<Node>();
        } else {
            return c10::make_intrusive<Node>();
        }
    }();
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    return node;
}

// Whether anyone looks at the gradient that reaches a node: a hook, retain_grad(), or torch.autograd.grad, of
// which it is a result.
inline bool is_observed(torch::autograd::Node& node) {
    if (!node.tensor_pre_hooks().empty() || !node.retains_grad_hooks().empty()) return true;
    if (!node.pre_hooks().empty() || !node.post_hooks().empty()) return true;
    const auto* executed = torch::autograd::get_current_graph_task_exec_info();
    if (executed == nullptr) return false;
    const auto found = executed->find(&node);
    return found != executed->end() && found->second.captures_ != nullptr;
}

}  // namespace bigramx

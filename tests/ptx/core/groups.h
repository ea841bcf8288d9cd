// Asynchronous operations in commit groups: those since the last commit_group are open, and wait_group n completes all
// but the n youngest groups (PTX ISA, "Completion Mechanisms for Asynchronous Copy Operations: Async-group").
#pragma once

#include <utility>
#include <vector>

namespace ptx {

template <class T>
struct Groups {
    std::vector<T> open;
    std::vector<std::vector<T>> committed;

    bool empty() const { return open.empty() && committed.empty(); }
    void clear() { open.clear(), committed.clear(); }
    void commit() {
        committed.push_back(std::move(open));
        open.clear();
    }
    template <class F>
    void complete_all_but(int n, F complete) {
        while (static_cast<int>(committed.size()) > n) {
            for (T& operation : committed.front()) complete(operation);
            committed.erase(committed.begin());
        }
    }
    template <class F>
    void for_each(F f) {
        for (auto& group : committed)
            for (T& operation : group) f(operation);
        for (T& operation : open) f(operation);
    }
};

}  // namespace ptx

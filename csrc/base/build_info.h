// How this library was built.
#pragma once

#include <map>
#include <string>

namespace bigramx {

std::map<std::string, std::string> build_info();

}  // namespace bigramx

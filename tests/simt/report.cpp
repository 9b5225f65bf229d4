// Finds the source lines of an error: see simt.h.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>

#include "simt.h"

namespace simt {
namespace {

// Whether a frame belongs to the kernel, not to the emulator or to the code between the two.
bool is_in_kernel(std::string_view line) {
    for (const char* other : {":?", " at cuda_runtime.h", " at invoke.h", " at tuple:"}) {
        if (line.find(other) != std::string_view::npos) return false;
    }
    return true;
}

// The command that prints the source lines of those addresses that are in this library; empty if the library
// cannot be found.
std::string command_for(void* const* addresses, int count) {
    Dl_info here, there;
    if (dladdr(reinterpret_cast<void*>(&source_lines), &here) == 0) return "";
    std::ostringstream command;
    command << "addr2line -Cfips -e '" << here.dli_fname << "'" << std::hex;
    for (int i = 0; i < count; ++i) {
        if (dladdr(addresses[i], &there) == 0 || there.dli_fbase != here.dli_fbase) continue;
        // The call itself, not the instruction it returns to.
        command << " 0x" << static_cast<char*>(addresses[i]) - static_cast<char*>(here.dli_fbase) - 1;
    }
    command << " 2>/dev/null";
    return command.str();
}

}  // namespace

std::string describe(Site site) {
    const std::string file = site.file;
    return "at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string source_lines(void* const* addresses, int count) {
    if (count == 0) return "";
    const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command_for(addresses, count).c_str(), "r"),
                                                       pclose);
    std::string lines;
    char line[1024];
    while (output != nullptr && std::fgets(line, sizeof(line), output.get()) != nullptr) {
        if (!is_in_kernel(line)) continue;
        const std::string_view text = line;
        lines += "\n    ";
        lines += text.substr(0, std::min(text.find(" (discriminator"), text.find('\n')));
    }
    return lines;
}

}  // namespace simt

// Reads a PTX text: declarations, then kernels statement by statement, each of which is decoded where its names are in scope.
#include <bitset>
#include <cstring>
#include <set>
#include <sstream>

#include "decode.h"

namespace ptx {
namespace {

constexpr size_t MOST_PARAMETERS = 512;
using Flow = std::bitset<MOST_PARAMETERS>;  // the parameters that a value was computed from

std::vector<std::string> split(const std::string& text, char by) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (const char letter : text) {
        depth += (strchr("{[(", letter) != nullptr) - (strchr("}])", letter) != nullptr);
        if (letter == by && depth == 0) parts.emplace_back();
        else parts.back() += letter;
    }
    return parts;
}

std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> found;
    for (std::string word; stream >> word;) found.push_back(word);
    return found;
}

// A variable's declaration: ".global .align 4 .b8 table[16] = {1, 2}", without the first word.
struct Variable {
    std::string name;
    uint32_t width = 0, alignment = 1, count = 1;
    bool sized = true;
    std::vector<uint64_t> values;
    uint32_t bytes() const { return width * count; }
};

class Parser {
   public:
    explicit Parser(const std::string& text) : text(text), module(new Module) {}
    std::unique_ptr<Module> run();

   private:
    const std::string& text;
    size_t at = 0;
    int line = 1;
    std::unique_ptr<Module> module;
    std::map<std::string, std::pair<uint32_t, uint32_t>> module_shared;
    std::vector<std::string> dynamic_arrays;
    uint32_t dynamic_alignment = 16;
    std::map<int, std::string> files;
    std::map<std::string, int> known_sources;

    [[noreturn]] void stop(const std::string& what) const { throw Failure(format("PTX line %d: %s", line, what.c_str())); }
    bool here(const char* word) const { return text.compare(at, strlen(word), word) == 0; }
    void skip_space();
    void skip_line();
    std::string until(const char* ends);
    Variable variable(const std::string& words_of_it) const;
    void declaration();
    void file();
    int location(const std::string& words_of_it);
    void kernel();
    void body(Kernel&, Names&);
    void declare_registers(const std::string& words_of_it, Names&);
    Statement statement(const std::string& whole, int first_line, int source) const;
};

void Parser::skip_space() {
    while (at < text.size()) {
        if (here("//")) {
            while (at < text.size() && text[at] != '\n') at++;
        } else if (here("/*")) {
            const size_t end = text.find("*/", at);
            for (; at < end + 2 && at < text.size(); at++) line += text[at] == '\n';
        } else if (isspace(text[at])) {
            line += text[at++] == '\n';
        } else {
            return;
        }
    }
}

void Parser::skip_line() {
    while (at < text.size() && text[at] != '\n') at++;
}

// The text up to one of `ends`, which is passed; brackets and comments are kept together, and line breaks become spaces.
std::string Parser::until(const char* ends) {
    std::string found;
    int depth = 0;
    for (; at < text.size(); at++) {
        if (here("//")) {
            while (at < text.size() && text[at] != '\n') at++;
        }
        const char letter = text[at];
        line += letter == '\n';
        if (depth == 0 && strchr(ends, letter)) {
            at++;
            return trimmed(found);
        }
        depth += (strchr("{[(", letter) != nullptr) - (strchr("}])", letter) != nullptr);
        found += letter == '\n' || letter == '\t' ? ' ' : letter;
    }
    stop("the text ends within a statement");
}

// ---- declarations --------------------------------------------------------------------------------------------------------------------

Variable Parser::variable(const std::string& declared) const {
    Variable found;
    const size_t equals = declared.find('=');
    const std::string head = trimmed(declared.substr(0, equals));
    const size_t bracket = head.find('[');
    const std::vector<std::string> parts = words(head.substr(0, bracket));
    found.name = parts.back();
    for (size_t i = 0; i + 1 < parts.size(); i++) {
        if (parts[i] == ".align") found.alignment = uint32_t(std::stoul(parts[i + 1]));
        else if (parts[i][0] == '.' && is_type(parts[i].substr(1))) found.width = type_of(parts[i].substr(1)).bytes();
    }
    if (!found.width) stop("no type in '" + declared + "'");
    if (found.alignment < found.width) found.alignment = found.width;
    if (bracket != std::string::npos) {
        const std::string count = trimmed(head.substr(bracket + 1, head.find(']') - bracket - 1));
        found.sized = !count.empty();
        found.count = found.sized ? uint32_t(std::stoul(count, nullptr, 0)) : 0;
    }
    if (equals != std::string::npos) {
        std::string values = trimmed(declared.substr(equals + 1));
        if (values[0] == '{') values = values.substr(1, values.size() - 2);
        for (const std::string& value : split(values, ',')) {
            const std::string number = trimmed(value);
            const bool bits = number.size() > 2 && strchr("fFdD", number[1]) && number[0] == '0';
            found.values.push_back(bits ? strtoull(number.c_str() + 2, nullptr, 16) : uint64_t(strtoll(number.c_str(), nullptr, 0)));
        }
    }
    return found;
}

void Parser::file() {
    skip_space();
    const int number = std::stoi(text.substr(at));
    const size_t quote = text.find('"', at), end = text.find('"', quote + 1);
    const std::string path = text.substr(quote + 1, end - quote - 1);
    files[number] = path.substr(path.rfind('/') + 1);
    at = end + 1;
    skip_line();
}

// ".loc 1 63 5" or ".loc 2 61 5, function_name $L__info_string0, inlined_at 1 71 5".  -> an index into Module::sources
int Parser::location(const std::string& given) {
    const auto known = known_sources.find(given);
    if (known != known_sources.end()) return known->second;
    const size_t inlined = given.find("inlined_at");
    const int caller = inlined == std::string::npos ? -1 : location(trimmed(given.substr(inlined + 10)));
    const std::vector<std::string> numbers = words(given);
    module->sources.push_back({numbers.at(0), std::stoi(numbers.at(1)), caller});  // the file's name is known at the end
    return known_sources[given] = int(module->sources.size()) - 1;
}

void Parser::declaration() {
    const int first_line = line;
    const std::string whole = until(";");
    const bool external = whole.find(".extern") != std::string::npos;
    const size_t shared = whole.find(".shared"), global = whole.find(".global"), constant = whole.find(".const");
    if (shared != std::string::npos) {
        const Variable found = variable(whole.substr(shared + 7));
        if (external) {
            dynamic_arrays.push_back(found.name);
            dynamic_alignment = std::max(dynamic_alignment, found.alignment);
        } else {
            module_shared[found.name] = {found.bytes(), found.alignment};
        }
    } else if (global != std::string::npos || constant != std::string::npos) {
        const Variable found = variable(whole.substr(std::min(global, constant)));
        std::unique_ptr<ModuleArray> array(new ModuleArray{found.name, std::vector<uint8_t>(found.bytes() + 16), 0});
        for (size_t i = 0; i < found.values.size(); i++) memcpy(&array->bytes[i * found.width], &found.values[i], found.width);
        array->bytes.resize(found.bytes());
        array->address = uint64_t(module->arrays.size() + 1) << REGION_BITS;
        module->arrays.push_back(std::move(array));
    } else {
        line = first_line;
        stop("a declaration that the machine does not know: " + whole.substr(0, 80));
    }
}

// ---- kernels -------------------------------------------------------------------------------------------------------------------------

void Parser::kernel() {
    std::unique_ptr<Kernel> made(new Kernel);
    made->name = until("(");
    const size_t begins = made->name.rfind(' ');
    made->name = made->name.substr(begins == std::string::npos ? 0 : begins + 1);
    Names names(*made);
    names.module_shared = module_shared;
    names.dynamic_arrays = dynamic_arrays;
    made->dynamic_alignment = dynamic_alignment;
    for (const std::string& declared : split(until(")"), ',')) {
        if (trimmed(declared).empty()) continue;
        const Variable found = variable(declared);
        if (found.bytes() > 8 || found.count != 1) stop("a parameter that is an array");
        made->parameters.push_back({found.name, found.width, names.allocate(found.width == 1 ? 2 : found.width).offset});
    }
    if (made->parameters.size() > MOST_PARAMETERS) stop("too many parameters");
    const std::vector<std::string> limits = words(until("{"));
    for (size_t i = 0; i + 1 < limits.size(); i++) {
        if (limits[i] != ".maxntid" && limits[i] != ".reqntid") continue;
        made->most_threads = 1;  // of up to three numbers, with commas between them
        for (size_t j = i + 1; j < limits.size() && isdigit(limits[j][0]); j++) made->most_threads *= uint32_t(std::stoul(limits[j]));
    }
    body(*made, names);
    module->kernels[made->name] = std::move(made);
}

// ".reg .b32 %r<12>;" and ".reg .pred p, q;"
void Parser::declare_registers(const std::string& declared, Names& names) {
    const size_t space = declared.find_first_of(" \t", 1);
    const Type type = type_of(declared.substr(1, space - 1));
    const uint32_t width = type.kind == 'p' ? 0 : type.bits == 8 ? 2 : type.bytes();
    for (const std::string& each : split(declared.substr(space), ',')) {
        const std::string name = trimmed(each);
        const size_t angle = name.find('<');
        if (angle == std::string::npos) {
            names.declare(name, width);
        } else {
            const int count = std::stoi(name.substr(angle + 1));
            for (int i = 0; i < count; i++) names.declare(name.substr(0, angle) + std::to_string(i), width);
        }
    }
}

Statement Parser::statement(const std::string& whole, int first_line, int source) const {
    Statement found;
    found.text = whole;
    found.line = first_line;
    found.source = source;
    std::string rest = whole;
    if (rest[0] == '@') {
        const size_t space = rest.find_first_of(" \t");
        found.negated = rest[1] == '!';
        found.predicate = rest.substr(1 + found.negated, space - 1 - found.negated);
        rest = trimmed(rest.substr(space));
    }
    const size_t space = rest.find_first_of(" \t");
    found.opcode = rest.substr(0, space);
    found.parts = split(found.opcode, '.');
    if (space != std::string::npos) {
        for (const std::string& operand : split(rest.substr(space), ',')) found.operands.push_back(trimmed(operand));
    }
    return found;
}

// The parameters that the kernel may write through: those from which the address of a store was computed.
std::vector<uint32_t> written(const Kernel& kernel, const std::vector<Statement>& statements) {
    std::map<uint32_t, Flow> from;
    for (size_t i = 0; i < kernel.parameters.size(); i++) from[kernel.parameters[i].row].set(i);
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = 0; i < statements.size(); i++) {
            const std::string& opcode = statements[i].parts[0];
            if (opcode == "atom" || opcode == "ldu" || (opcode == "ld" && !statements[i].has("param"))) continue;
            Flow sources;
            for (const uint32_t row : kernel.code[i].reads) sources |= from[row];
            if (sources.none()) continue;
            for (const uint32_t row : kernel.code[i].writes) {
                Flow& known = from[row];
                changed |= (sources & ~known).any();
                known |= sources;
            }
        }
    }
    Flow through;
    for (size_t i = 0; i < statements.size(); i++) {
        const Statement& s = statements[i];
        const bool stores = s.parts[0] == "st" || s.parts[0] == "atom" || s.parts[0] == "red" || s.opcode.rfind("cp.async.bulk.global", 0) == 0;
        if (!stores || (s.parts[0] != "cp" && (s.has("shared") || s.has("shared::cta")))) continue;
        Flow sources;
        for (const uint32_t row : kernel.code[i].reads) sources |= from[row];
        through |= sources.none() ? ~Flow() : sources;
    }
    std::vector<uint32_t> found;
    for (uint32_t i = 0; i < kernel.parameters.size(); i++) {
        if (through[i]) found.push_back(i);
    }
    return found;
}

void Parser::body(Kernel& made, Names& names) {
    std::vector<Statement> statements;
    std::vector<std::pair<size_t, std::string>> branches;
    int source = -1;
    for (int depth = 1; depth > 0;) {
        skip_space();
        if (here("{") || here("}")) {
            const bool opens = text[at++] == '{';
            depth += opens ? 1 : -1;
            if (opens) names.scopes.emplace_back();
            else if (depth > 0) names.scopes.pop_back();
            continue;
        }
        const int first_line = line;
        if (here(".loc") && isspace(text[at + 4])) {
            at += 4;
            const size_t begins = at;
            skip_line();
            source = location(trimmed(text.substr(begins, at - begins)));
            continue;
        }
        size_t end = at;
        while (end < text.size() && (isalnum(text[end]) || strchr("_$", text[end]))) end++;
        if (end > at && text[end] == ':') {
            made.labels[text.substr(at, end - at)] = int(made.code.size());
            at = end + 1;
            continue;
        }
        const std::string whole = until(";");
        if (whole.empty()) continue;
        if (whole.rfind(".reg", 0) == 0) {
            declare_registers(trimmed(whole.substr(4)), names);
        } else if (whole.rfind(".shared", 0) == 0) {
            const Variable found = variable(whole.substr(7));
            names.shared_array(found.name, found.bytes(), found.alignment);
        } else if (whole.rfind(".local", 0) == 0) {
            stop("local memory: " + whole);
        } else if (whole.rfind(".pragma", 0) != 0) {
            if (whole[0] == '.') stop("a directive that the machine does not know: " + whole);
            statements.push_back(statement(whole, first_line, source));
            const Statement& s = statements.back();
            if (s.parts[0] == "bra") branches.emplace_back(made.code.size(), s.operands.at(0));
            made.async_proxy |= s.parts[0] == "wgmma" || s.has("bulk");
            made.global_atomics |= (s.parts[0] == "atom" || s.parts[0] == "red") && !s.has("shared") && !s.has("shared::cta");
            made.code.push_back(decode(*module, made, s, names));
        }
    }
    for (const auto& [index, label] : branches) {
        const auto found = made.labels.find(label);
        if (found == made.labels.end()) stop("a branch to '" + label + "', which is not in the kernel");
        made.code[index].target = found->second;
    }
    Instruction end;
    end.kind = Kind::EXIT;
    end.line = line;
    end.text = "the end of the kernel";
    made.code.push_back(end);
    made.written_parameters = written(made, statements);
}

std::unique_ptr<Module> Parser::run() {
    for (skip_space(); at < text.size(); skip_space()) {
        if (here(".version") || here(".target") || here(".address_size")) {
            skip_line();
        } else if (here(".file")) {
            at += 5;
            file();
        } else if (here(".section")) {
            until("{");
            at--;
            until("\n");
        } else {
            const size_t entry = text.find(".entry", at), function = text.find(".func", at), semicolon = text.find(';', at);
            if (function < semicolon && function < entry) stop("a function that is called: the machine runs kernels whose functions are inlined");
            if (entry != std::string::npos && entry < semicolon) kernel();
            else declaration();
        }
    }
    for (Source& source : module->sources) {
        const auto file = files.find(std::stoi(source.file));
        if (file != files.end()) source.file = file->second;
    }
    return std::move(module);
}

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
